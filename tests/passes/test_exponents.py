"""Values held at other exponents mean what they meant, to the last bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from scaleprop.errors import PassError
from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture
from scaleprop.passes.exponents import Carried, carry, has_scale, most

aten = torch.ops.aten


class Mixed(nn.Module):
    """Products, sums, masks, norms, attention, concatenation, comparisons, places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.norm(self.layer(self.embed(ids)))
        masked = scores.masked_fill(ids[:, None] > 10, float("-inf")).softmax(-1)
        both = torch.cat([x * 0.5, x.clamp(min=0)], -1) @ x.new_ones(32, 4)
        best, places = both.topk(2)
        kept = torch.where(both > 0, both, 0.0) + ids[..., None] + (masked @ both).square()
        return kept, best, places, both.sum(1).exp(), x.std(-1), both.pow(3).abs().sqrt()


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                                  nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                  nn.Linear(8, 5))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def program(name: str) -> Program:
    torch.manual_seed(0)
    if name == "mixed":
        inputs = (torch.randint(0, 20, (2, 5)), torch.randn(2, 5, 5).double())
        return capture(Mixed().double(), inputs)
    return capture(Conv().double(), (torch.randn(2, 3, 16, 16).double(),))


def carried(given: Program, seed: int, spread: int = 8) -> tuple[Program, Carried]:
    """The program with a random exponent on every value that has a scale."""
    draw = random.Random(seed)
    copy = given.fork()
    wanted = {node: draw.randint(-spread, spread) for node in copy.module.graph.nodes
              if has_scale(node)}  # fmt: skip
    return copy, carry(copy.module, wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["mixed", "conv"])
def test_random_exponents_change_no_bit(name: str, seed: int):
    before = program(name)
    after, result = carried(before, seed)
    assert len(result.rescales) > 10
    assert {node.op for node in result.exponents} <= {"call_function", "placeholder", "get_attr"}
    leaves = before.example_leaves
    for got, want in zip(after.module(*leaves), before.module(*leaves), strict=True):
        assert torch.equal(got, want)


def test_every_value_is_held_where_it_is_said_to_be():
    before = program("mixed")
    after, result = carried(before, 5)
    held, plain = Values(after.module), Values(before.module)
    held.run(*before.example_leaves)
    plain.run(*before.example_leaves)
    checked = 0
    for node, exponent in result.exponents.items():
        if node.name in plain.seen and isinstance(held.seen[node.name], torch.Tensor):
            expected = plain.seen[node.name] * 2.0**-exponent
            assert torch.equal(held.seen[node.name], expected), node
            checked += 1
    assert checked > 10


class Values(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, object] = {}

    def run(self, *leaves: object) -> object:
        return super().run(*leaves, enable_io_processing=False)

    def run_node(self, n: torch.fx.Node) -> object:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def chain(function: object, *shape: int) -> torch.fx.GraphModule:
    return capture(Function(function), (torch.randn(*shape, dtype=torch.float64),)).module


class Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_a_scale_passes_through_homogeneous_operators_for_nothing():
    module = chain(lambda x: (x.relu() * 2).reshape(6, 2).sum(-1) * x.amax(), 3, 4)
    (source,) = module.graph.find_nodes(op="placeholder")
    result = carry(module, {source: 3})
    # in at the input, out at the result: nothing in between
    assert len(result.rescales) == 2
    (product,) = [n for n, e in result.exponents.items() if e == 6]
    assert product.target is aten.mul.Tensor


def test_there_and_back_costs_one_rescale():
    module = chain(lambda x: (x.exp(), x.tanh(), x.relu()), 3, 4)
    (source,) = module.graph.find_nodes(op="placeholder")
    result = carry(module, {source: 3})
    assert len(result.rescales) == 2  # in for relu, out of relu; exp and tanh read the input
    assert [n.args[0] for n in module.graph.nodes if n.target in (
        aten.exp.default, aten.tanh.default)] == [source, source]  # fmt: skip


def test_terms_of_a_sum_are_aligned():
    module = chain(lambda x: x.relu() + x.abs(), 3, 4)
    relu = module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    result = carry(module, {relu: 4})
    (total,) = module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert {result.exponents.get(term, 0) for term in total.args} == {4}


def test_operators_without_a_rule_are_reported_and_read_plain_values():
    module = chain(lambda x: torch.special.erfinv(x.relu().clamp(max=0.5)), 3, 4)
    relu = module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    x = torch.randn(3, 4).double()
    want = module(x)
    assert carry(module, {relu: 4}).unruled == {"aten.erfinv.default": 1}
    assert torch.equal(module(x), want)


def test_masks_zeros_and_infinities_have_no_scale():
    module = chain(lambda x: torch.where(x > 0, x, torch.zeros_like(x)) + torch.full_like(
        x, float("-inf")).expand(3, 4).masked_fill(x < 9, 0.0), 3, 4)  # fmt: skip
    scaled = {str(node.target) for node in module.graph.nodes if has_scale(node)}
    assert not scaled & {"aten.gt.Scalar", "aten.full_like.default", "aten.zeros_like.default",
                         "aten.expand.default"}  # fmt: skip
    assert "aten.where.self" in scaled


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exponent_out_of_range_is_an_error(dtype: torch.dtype):
    bound = most(dtype)
    module = capture(Function(lambda x: x.relu() * 2), (torch.randn(3, 4).to(dtype),)).module
    relu = module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with pytest.raises(PassError, match=rf"relu.*an exponent of {bound + 1} .*beyond ±{bound}, "):
        carry(module, {relu: bound + 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_and_data_stay_numbers_of_their_dtype(dtype: torch.dtype):
    factor = torch.tensor(2.0, dtype=torch.float64) ** most(dtype)
    for value in (factor, 1 / factor, 4 / factor, factor * 4):
        kept = value.to(dtype)
        assert kept == value and kept.abs() >= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponents_add_up_to_what_the_dtype_has_room_for(dtype: torch.dtype):
    """Two factors near one, at two thirds of the bound: at the sum of their exponents a half-
    precision product would lose its last bits."""
    third = most(dtype) * 2 // 3
    x = torch.rand(64, dtype=torch.float64).add(0.5).to(dtype)
    module = capture(Function(lambda x: (x * 2) * (x * 3) + x), (x,)).module
    want = module(x)
    first, second, _ = module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    result = carry(module, {first: third, second: third})
    assert set(result.exponents.values()) == {third}
    assert torch.equal(module(x), want)


@pytest.mark.parametrize(("held", "exponent"), [(-11, 11), (11, -8), (9, -11)])
def test_far_moves_in_half_precision_take_two_factors(held: int, exponent: int):
    x = torch.rand(64).add(0.5).half()
    module = capture(Function(lambda x: (x.relu() * 0.5, x.relu().neg())), (x,)).module
    want = module(x)
    nodes = {node.target: node for node in module.graph.nodes}
    carry(module, {nodes[aten.relu.default]: held, nodes[aten.neg.default]: exponent,
                   nodes[aten.mul.Tensor]: exponent})
    factors = [abs(float(node.args[1])) for node in module.graph.find_nodes(
        op="call_function", target=aten.mul.Tensor) if node is not nodes[aten.mul.Tensor]]
    assert max(max(factors), 1 / min(factors)) <= 2.0 ** most(torch.float16)
    for got, expected in zip(module(x), want, strict=True):
        assert torch.equal(got, expected)


def test_integers_that_come_out_have_no_scale():
    module = chain(lambda x: (x.relu().round().cumsum(0, dtype=torch.int64), x.relu() * 2), 3, 4)
    x = torch.randn(3, 4).double() * 9
    want = module(x)
    carry(module, {n: 3 for n in module.graph.nodes if has_scale(n)})
    assert want[0].dtype == torch.int64
    for got, expected in zip(module(x), want, strict=True):
        assert torch.equal(got, expected)
