"""Convolutions by training recipe, against convolutions of quantized factors written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop import ops
from scaleprop.backends import quantized
from scaleprop.formats import fake_quantize
from scaleprop.ops import estimators
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

INT4 = "int4[tensor]*f32"


class Net(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(4, 9, 9))
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, 2, groups=groups)
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x * self.embed).square())
        return self.last(x.mean((2, 3))).square().mean()


def prepared(recipe: str | TrainingRecipe, groups: int = 1, inner: Any = "eager") -> nn.Module:
    torch.manual_seed(0)
    return scaleprop.prepare_training(Net(groups), recipe, inner=inner)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def positions(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return flat.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def by_hand(recipe: TrainingRecipe, x: torch.Tensor) -> list[torch.Tensor]:
    """A step of ``Net``: fake-quantized factors, float convolutions."""

    def q(value: torch.Tensor, role: str, axis: int) -> torch.Tensor:
        operand = recipe.operands.get(role)
        if operand is None:
            return value
        weight = role.endswith(".w")
        flat = value.flatten(1) if weight else positions(value)
        soft = estimators.forward(operand.estimator, flat, operand.format, axis)
        found = fake_quantize(soft, operand.format, axis)
        return found.reshape(value.shape) if weight else images(found, value)

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any, b: Any, stride: int, padding: int) -> Any:
            ctx.save_for_backward(x, w)
            ctx.stride, ctx.padding = stride, padding
            return F.conv2d(q(x, "fprop.x", 1), q(w, "fprop.w", 1), b, stride, padding)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            x, w = ctx.saved_tensors
            dx = torch.nn.grad.conv2d_input(x.shape, q(w, "dgrad.w", 0), q(dy, "dgrad.dy", 1),
                                            ctx.stride, ctx.padding)
            dw = torch.nn.grad.conv2d_weight(q(x, "wgrad.x", 0), w.shape, q(dy, "wgrad.dy", 0),
                                             ctx.stride, ctx.padding)
            operand = recipe.operands.get("fprop.w")
            if operand is not None:
                dw = estimators.backward(operand.estimator, dw.flatten(1), w.flatten(1),
                                         operand.format, 1).reshape(w.shape)
            return dx, dw, dy.sum((0, 2, 3)), None, None

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any) -> Any:
            ctx.save_for_backward(x, w)
            return q2(x, "fprop.x", 1) @ q2(w, "fprop.w", 1).t()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            x, w = ctx.saved_tensors
            dw = q2(dy, "wgrad.dy", 0).t() @ q2(x, "wgrad.x", 0)
            operand = recipe.operands.get("fprop.w")
            if operand is not None:
                dw = estimators.backward(operand.estimator, dw, w, operand.format, 1)
            return q2(dy, "dgrad.dy", 1) @ q2(w, "dgrad.w", 0), dw

    def q2(value: torch.Tensor, role: str, axis: int) -> torch.Tensor:
        operand = recipe.operands.get(role)
        if operand is None:
            return value
        soft = estimators.forward(operand.estimator, value, operand.format, axis)
        return fake_quantize(soft, operand.format, axis)

    torch.manual_seed(0)
    net = Net()
    hidden = Conv.apply(x * net.embed, net.first.weight, net.first.bias, 2, 1).square()
    hidden = Conv.apply(hidden, net.second.weight, net.second.bias, 1, 0).mean((2, 3))
    loss = (Linear.apply(hidden, net.last.weight) + net.last.bias).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


MXFP8 = training_recipe("mxfp8").replace(name="mxfp8-cnn", convolutions=True, high=())
BLOCKS = TrainingRecipe(
    name="blocks", description="", convolutions=True, high=(),
    operands={"fprop.x": Operand(format="mxfp8"), "fprop.w": Operand(format="int8[row]*f32"),
              "wgrad.dy": Operand(format="e5m2[tensor]*f32")})


@pytest.mark.parametrize("recipe", [training_recipe("int4-cnn"), MXFP8, BLOCKS],
                         ids=lambda r: r.name)
def test_a_step_is_the_convolutions_written_out(recipe: TrainingRecipe):
    x = torch.randn(6, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    got, want, exact = step(prepared(recipe), x), by_hand(recipe, x), step(prepared("fp32"), x)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()
    assert (got[2] - exact[2]).norm() > 1e-3 * exact[2].norm()


def test_the_graph_of_int4_cnn_carries_what_it_declares(monkeypatch: pytest.MonkeyPatch):
    """Every weight in 15 levels before every product that reads it, and nothing else."""
    found: list[tuple[str, int]] = []

    def spied(joint: torch.fx.GraphModule, *rest: Any) -> Any:
        made = quantized_operands(joint, *rest)
        for node in joint.graph.find_nodes(op="call_function", target=ops.quantize_operand):
            source = node.args[0]
            assert source.target is ops.softened and node.args[3] == "nearest"
            found.append((node.args[1], source.args[0].meta["val"].numel()))
        return made

    quantized_operands = quantized.quantize_operands
    monkeypatch.setattr(quantized, "quantize_operands", spied)
    model = prepared("int4-cnn")
    step(model, torch.randn(2, 4, 9, 9))
    sizes = {p.numel() for p in model.parameters() if p.ndim > 1 and len(p.shape) != 3}
    assert {size for _, size in found} == sizes
    assert {format for format, _ in found} == {"int4[tensor]*f32:mse"}


def test_inductor_gives_the_same_step():
    x = torch.randn(6, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    # the first layer alone: each takes long to compile
    recipe = training_recipe("int4-cnn").replace(name="first", high=("head",))
    got, want = (step(prepared(recipe, 2, inner), x) for inner in ("inductor", "eager"))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()


def test_a_convolution_of_groups_stays_high_and_is_listed():
    x = torch.randn(2, 4, 9, 9)
    model = prepared("int4-cnn", groups=2)
    step(model, x)
    (report,) = model.scale_report()
    assert [why for why in report.high.values() if "groups" in why] == [
        "a convolution of groups: what it sums over is not all channels"] * 2
    assert {each.layer for each in report.quantized} == {"first.weight", "last.weight"}


def test_convolutions_stay_high_unless_the_recipe_has_them():
    x = torch.randn(2, 4, 9, 9)
    model = prepared(training_recipe("int4-cnn").replace(convolutions=False))
    step(model, x)
    (report,) = model.scale_report()
    assert {each.layer for each in report.quantized} == {"last.weight"}
    assert sum("convolution" in why for why in report.high.values()) == 4


@pytest.mark.parametrize(("high", "low"), [
    (("first:1",), {"second.weight", "last.weight"}),
    (("last:1", "first:1"), {"second.weight"}),
    (("last:2",), {"first.weight"}),
    (("head",), {"first.weight", "second.weight"})])
def test_convolutions_count_among_the_layers_that_are_kept_high(
    high: tuple[str, ...], low: set[str]
):
    x = torch.randn(2, 4, 9, 9)
    model = prepared(MXFP8.replace(high=high))
    step(model, x)
    (report,) = model.scale_report()
    assert {each.layer for each in report.quantized} == low
    assert len([why for why in report.high.values() if "branches" in why]) == sum(
        {"first.weight": 2, "second.weight": 2, "last.weight": 3}[name]
        for name in {"first.weight", "second.weight", "last.weight"} - low if high != ("head",))
