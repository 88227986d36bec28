"""The products next to a loss stay in high precision, wherever the graph puts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop import _torch_compat as compat
from scaleprop.passes.training import Formats, lower_products
from scaleprop.passes.training.head import BACKWARD, FORWARD

from .training_graphs import joint_of, trained

LABELS = torch.arange(6) % 5
WHY = {"fprop": FORWARD, "dgrad": BACKWARD, "wgrad": BACKWARD}
Sorted = dict[str, set[tuple[str, str]]]  # "low" or "high" → (role, a linear layer's name)


class Of(nn.Module):
    """``run`` of named layers and the inputs."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(self, *inputs)


def linears(run: Callable[..., Any], **widths: tuple[int, int]) -> Of:
    torch.manual_seed(0)
    return Of(run, **{name: nn.Linear(*sizes, bias=False) for name, sizes in widths.items()})


def products(model: nn.Module, *inputs: torch.Tensor, formats: Formats | None = None) -> Sorted:
    """Which products ran in low precision, and which did not, by role and layer.

    Told from sizes alone: every weight of a model has sizes of its own, in its products' results.
    """
    widths = {tuple(p.shape): name.split(".")[0] for name, p in model.named_parameters()}

    def use(joint: torch.fx.GraphModule, parameters: Any, values: Any) -> Sorted:
        named = {node.name: _role(node, parameters, widths) for node in joint.graph.nodes
                 if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)}
        tangents = [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")
                    if str(node.target).startswith("tangents")]
        with compat.without_modes():
            incoming = [torch.ones(tuple(value.shape)) for value in tangents]
        result = lower_products(joint, parameters, formats or Formats(), [*values[:-1], *incoming])
        for node, why in result.high.items():
            assert why == WHY[named[node][0]]
        for node, role in result.products.items():
            assert named[node][0] == role
        return {"low": {named[node] for node in result.products},
                "high": {named[node] for node in result.high}}

    (found,) = joint_of(model, *inputs, use=use)
    assert not found["low"] & found["high"]
    return found


def _role(
    node: torch.fx.Node, parameters: list[torch.fx.Node], widths: dict[tuple[int, ...], str]
) -> tuple[str, str]:
    """A product's role and layer: what a parameter's transpose makes is no weight's gradient."""
    factors = []
    for given in node.args[-2:]:
        while given not in parameters and given.target in (
                torch.ops.aten.t.default, torch.ops.aten.permute.default):
            given = given.args[0]
        factors.append(given)
    of = [given for given in factors if given in parameters]
    if of:
        backward = any("tangents" in str(n.target) for n in _before(node))
        return "dgrad" if backward else "fprop", widths[tuple(of[0].meta["val"].shape)]
    shape = tuple(node.meta["val"].shape)
    return "wgrad", widths.get(shape) or widths[shape[::-1]]


def _before(node: torch.fx.Node) -> set[torch.fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


def all_of(*layers: str, but: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    return {(role, layer) for layer in layers for role in WHY if role not in but}


def loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, LABELS)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def test_two_heads_stay_high(x: torch.Tensor):
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        shared = m.trunk(x).relu()
        return loss(m.left(shared)) + 0.1 * m.right(shared).square().mean()

    found = products(linears(run, trunk=(8, 16), left=(16, 5), right=(16, 3)), x)
    assert found["high"] == all_of("left", "right")
    assert found["low"] == {("fprop", "trunk"), ("wgrad", "trunk")}


def test_a_head_that_another_layer_reads_is_none(x: torch.Tensor):
    """Of two losses, one far up: the layer that it reads feeds the next one too."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        early = m.first(x)
        return loss(m.last(early.relu())) + early.square().mean()

    found = products(linears(run, first=(8, 16), last=(16, 5)), x)
    assert found["high"] == all_of("last")
    assert found["low"] == {("fprop", "first"), ("wgrad", "first")}


def test_a_frozen_head_stays_high(x: torch.Tensor):
    model = linears(lambda m, x: loss(m.head(m.trunk(x).relu())), trunk=(8, 16), head=(16, 5))
    model.head.requires_grad_(False)
    found = products(model, x)
    assert found["high"] == all_of("head", but=("wgrad",))
    assert found["low"] == {("fprop", "trunk"), ("wgrad", "trunk")}


def test_behind_a_frozen_trunk(x: torch.Tensor):
    model = linears(lambda m, x: loss(m.head(m.trunk(x).relu())), trunk=(8, 16), head=(16, 5))
    model.trunk.requires_grad_(False)
    found = products(model, x)
    assert found["high"] == all_of("head", but=("dgrad",))
    assert found["low"] == {("fprop", "trunk")}


def test_a_head_behind_a_residual_block(x: torch.Tensor):
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.inside(x)
        x = x + m.down(m.up(x).relu())
        return loss(m.head(x))

    found = products(linears(run, inside=(8, 16), up=(16, 24), down=(24, 16), head=(16, 5)), x)
    assert found["high"] == all_of("head")
    assert found["low"] == all_of("up", "down") | {("fprop", "inside"), ("wgrad", "inside")}


def test_a_residual_block_next_to_the_loss(x: torch.Tensor):
    """The skip brings the loss's gradient to the layer before the block too, but in a sum with
    what came through the block; a norm in between changes nothing."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.inside(x)
        x = x + m.down(m.up(x).relu())
        return F.layer_norm(x, (16,)).pow(4).mean()

    found = products(linears(run, inside=(8, 16), up=(16, 24), down=(24, 16)), x)
    assert found["high"] == all_of("down")
    assert found["low"] == all_of("up") | {("fprop", "inside"), ("wgrad", "inside")}


def test_one_single_linear_layer_and_its_loss(x: torch.Tensor):
    """Nothing is in low precision: every bit is what it was."""
    model = linears(lambda m, x: loss(m.head(x)), head=(8, 5))
    assert products(model, x) == {"low": set(), "high": all_of("head", but=("dgrad",))}
    got = trained(model, x, formats=Formats())
    model.zero_grad()
    want = model(x)
    want.backward()
    assert torch.equal(got[0], want.detach()) and torch.equal(got[1], model.head.weight.grad)


def test_a_loss_outside_of_the_graph(x: torch.Tensor):
    model = linears(lambda m, x: m.head(m.trunk(x).relu()), trunk=(8, 16), head=(16, 5))
    found = products(model, x)
    assert found["high"] == all_of("head")
    assert found["low"] == {("fprop", "trunk"), ("wgrad", "trunk")}


def test_two_heads_whose_losses_are_outside(x: torch.Tensor):
    class Both(nn.Module):
        """A tensor of which both results are views would be one result."""

        def forward(self, m: Any, x: torch.Tensor) -> torch.Tensor:
            shared = m.trunk(x).relu()
            return torch.cat([m.left(shared), m.right(shared)], 1)

    model = linears(lambda m, x: Both()(m, x), trunk=(8, 16), left=(16, 5), right=(16, 3))
    assert not products(model, x)["high"]


def test_a_linear_layer_alone_is_a_piece_and_no_end(x: torch.Tensor):
    found = products(linears(lambda m, x: m.only(x), only=(8, 5)), x)
    assert found == {"low": {("fprop", "only"), ("wgrad", "only")}, "high": set()}


def test_a_block_alone_is_a_piece_and_no_end(x: torch.Tensor):
    """What comes out is a sum of two products: a stream, that more layers may read."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.inside(x)
        return x + m.down(m.up(x).relu())

    found = products(linears(run, inside=(8, 16), up=(16, 24), down=(24, 16)), x)
    assert not found["high"] and ("dgrad", "down") in found["low"]


def test_a_tied_head(x: torch.Tensor):
    """A lookup is no product: the table is the head's weight, and nothing else is high."""

    def run(m: Any, ids: torch.Tensor) -> torch.Tensor:
        y = F.embedding(ids, m.head.weight)
        return F.cross_entropy(m.head(y + m.body(y).relu()), ids)

    found = products(linears(run, body=(16, 16), head=(16, 5)), LABELS)
    assert found["high"] == all_of("head") and found["low"] == all_of("body")


def test_all_can_be_low_if_asked(x: torch.Tensor):
    model = linears(lambda m, x: loss(m.head(m.trunk(x).relu())), trunk=(8, 16), head=(16, 5))
    found = products(model, x, formats=Formats(head=True))
    assert not found["high"]
    assert found["low"] == all_of("head", "trunk") - {("dgrad", "trunk")}
