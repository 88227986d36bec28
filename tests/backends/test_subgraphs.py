"""Equal pieces of a graph: one graph for all of them, and the same numbers."""

from __future__ import annotations

import dataclasses
import operator
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import scaleprop
from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.backends import subgraphs
from scaleprop.backends.graphs import spelled_table
from scaleprop.backends.subgraphs import PIECES, is_worth_sharing, share
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe

INVOKE = torch.ops.higher_order.invoke_subgraph


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def shared(function, *values):
    """What was traced of ``function``, shared; how many calls of pieces, and of how many graphs."""
    module = make_fx(function, tracing_mode="fake")(*values)
    with torch.no_grad(), compat.fake_mode_of(module.graph):
        share(module, spelled_table())
    calls = module.graph.find_nodes(op="call_function", target=INVOKE)
    assert not any(node.target in PIECES for node in module.graph.nodes)
    return module, len(calls), len({call.args[0].target for call in calls})


def stochastic(x, step, stream, axis=1, format="nvfp4"):
    bits = ops.random_bits(step, stream, list(x.shape), 7, 8, 0)
    return ops.quantize_operand(x, format, axis, "stochastic:8", bits)


def test_pieces_that_are_alike_are_one_graph_with_the_same_numbers():
    def function(a, b, c, step, streams):
        found = [stochastic(x, step, streams[place:place + 1]) for place, x in enumerate((a, b))]
        found.append(stochastic(c, step, streams[2:3]))  # of another shape
        return [part for pair in found for part in pair]

    values = [*inputs((32, 64), (32, 64), (64, 32)), torch.tensor([5]), torch.tensor([11, 12, 13])]
    module, calls, graphs = shared(function, *values)
    assert (calls, graphs) == (3, 2)
    expected, found = function(*values), module(*values)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], function(values[0], *values[1:4], values[4] + 1)[0])


@pytest.mark.parametrize("other", [{"axis": 0}, {"format": "nvfp4_2d"}])
def test_pieces_with_other_constants_are_not_alike(other):
    def function(a, b, step, stream):
        return [*stochastic(a, step, stream), *stochastic(b, step, stream, **other)]

    values = [*inputs((32, 32), (32, 32)), torch.tensor([5]), torch.tensor([11])]
    module, calls, graphs = shared(function, *values)
    assert (calls, graphs) == (2, 2)
    assert all(map(torch.equal, module(*values), function(*values)))


def test_pieces_of_inputs_that_lie_otherwise_are_not_alike():
    def function(a, b):
        return [ops.quantize_operand(a, "mxfp8", 1)[0], ops.quantize_operand(b.t(), "mxfp8", 1)[0]]

    values = inputs((32, 64), (64, 32))
    module, calls, graphs = shared(function, *values)
    assert (calls, graphs) == (2, 2)
    assert all(map(torch.equal, module(*values), function(*values)))


def test_what_is_read_elsewhere_is_a_piece_of_its_own():
    """A rotation that two quantizers read is made once; one that a single one reads, within it."""
    def function(a, b):
        both, mine = (ops.rotate(x, 16, None, 1) for x in (a, b))
        found = [ops.quantize_operand(both, "mxfp4", axis)[0] for axis in (0, 1)]
        return [*found, ops.quantize_operand(mine, "mxfp4", 1)[0]]

    values = inputs((32, 32), (32, 32))
    module, calls, graphs = shared(function, *values)
    assert (calls, graphs) == (4, 4)
    assert all(map(torch.equal, module(*values), function(*values)))


def test_an_input_that_is_read_twice_is_not_taken_for_two():
    def function(a, b):
        return [ops.estimate(a, x, "clipped", "mxfp4", 1) for x in (a, b)]

    values = inputs((32, 32), (32, 32))
    module, calls, graphs = shared(function, *values)
    assert (calls, graphs) == (2, 2)
    assert all(map(torch.equal, module(*values), function(*values)))


def test_a_graph_without_pieces_stays_as_it_is():
    module, calls, _ = shared(lambda x: x + operator.neg(x), *inputs((3, 3)))
    assert calls == 0 and not list(module.children())


def test_graphs_of_few_pieces_or_of_symbolic_sizes_are_left():
    def function(x):
        for _ in range(subgraphs.MANY):
            x = ops.rotate(x, 16, None, 1)
        return x

    (x,) = inputs((16, 16))
    many = make_fx(function, tracing_mode="fake")(x)
    assert is_worth_sharing(many.graph)
    assert not is_worth_sharing(make_fx(function, tracing_mode="symbolic")(x).graph)
    last = many.graph.output_node().args[0]
    last.replace_all_uses_with(last.args[0])
    many.graph.erase_node(last)
    assert not is_worth_sharing(many.graph)


def test_inductor_compiles_layers_once_and_gives_the_same_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subgraphs, "MANY", 1)
    operands = dict.fromkeys(OPERANDS[:6], Operand(format="mxfp4"))
    gradient = Operand(format="mxfp4", rounding="stochastic:8", hadamard=32, signs="step")
    recipe = TrainingRecipe(name="mine", description="", operands=operands | {
        "wgrad.dy": gradient, "wgrad.x": dataclasses.replace(gradient, rounding="nearest")})

    def step(inner):
        torch.manual_seed(0)
        layers = [nn.Linear(32, 32, bias=False) for _ in range(4)]
        model = scaleprop.prepare_training(nn.Sequential(*layers), recipe, inner=inner)
        loss = model(torch.randn(64, 32)).square().mean()
        loss.backward()
        return [loss.detach(), *(layer.weight.grad for layer in layers)]

    got, codes = run_and_get_code(step, "inductor")
    expected = step("eager")
    assert (got[0] - expected[0]).abs() < 1e-6 * expected[0]
    for mine, other in zip(got[1:], expected[1:], strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()
    backward = codes[1]  # four layers' gradients, by the same functions
    assert 0 < backward.count("def scaleprop_piece_") < backward.count("= scaleprop_piece_")
    called = set(re.findall(r"torch\.ops\.scaleprop\.[\w.]+(?=\()", "".join(codes)))
    assert called <= {"torch.ops.scaleprop.wide_mm.default"}
