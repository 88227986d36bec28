"""Rotations cancel: in a format of 11 bits every rotated recipe gives float32's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.recipes.training import Operand, TrainingRecipe

FINE = "e5m10[tensor]*f32"  # of 2^-11 relative error; nothing is beyond its largest value
TOKENS, WIDTH, OUT = 40, 48, 24  # no multiples of the rotations


def recipe(estimator: str = "ste", signs: Any = "layer", **changes: Any) -> TrainingRecipe:
    """Backward products of what forward made, in its basis, rotated once more."""
    # so that nothing is clipped, the largest value neither
    forward = Operand(format=FINE, hadamard=32, signs=signs, estimator=estimator, headroom=1.125)
    gradient = Operand(format=FINE, hadamard=16, signs="step")
    again = Operand(format=FINE, hadamard=16, signs="step", of="quantized")
    return TrainingRecipe(name="fine", description="", operands={
        "fprop.x": forward, "fprop.w": forward, "dgrad.dy": gradient, "dgrad.w": again,
        "wgrad.dy": gradient, "wgrad.x": again}).replace(**changes)


class Model(nn.Module):
    """Layers between a parameter and a head; all that they may be connected by."""

    def __init__(self, outputs: int = OUT) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, outputs) for _ in range(3))
        self.head = nn.Linear(outputs, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x * self.embed)).square().mean()

    def body(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class OneInput(Model):
    """Three layers of one input, in two views of it."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(4, -1, WIDTH)
        first, second = x.view(TOKENS, WIDTH), x.view(TOKENS, WIDTH)
        return self.q(first).square() + self.k(second).sin() + self.v(second).cos()


class OneWeight(Model):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__(WIDTH)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(self.q(x).sin()).sin()


class _Added(torch.autograd.Function):
    """x·wᵀ + the sum of x's rows, whose gradients are added to in their products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + x.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (dy,), (x, w) = grad_outputs, ctx.saved_tensors
        rest = dy.sum(1, keepdim=True).expand(-1, WIDTH)
        return torch.addmm(rest, dy, w), torch.addmm(torch.zeros_like(w), dy.t(), x)


class Added(Model):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return _Added.apply(x, self.q.weight).sin()


class Turned(Model):
    """A weight that lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Parameter(torch.randn(WIDTH, OUT) / 7)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.across).sin()


RECIPES = {
    "ste": recipe(), "estimated": recipe("clipped"), "fresh signs": recipe("clipped", "step"),
    "x of data": recipe("clipped", **{"wgrad.x.of": "data"}),
    "w of data": recipe(**{"dgrad.w.of": "data"}),
    "w alone estimated": recipe(**{"fprop.w.estimator": "clipped"}),
    "forward alone": recipe("clipped", **{role: None for role in (
        "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")}),
}


CASES = [*((OneInput, name) for name in RECIPES), (OneWeight, "ste"), (OneWeight, "estimated"),
         (Added, "ste"), (Added, "estimated"), (Added, "forward alone"), (Turned, "estimated")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_rotated_gradients_are_those_of_float32(kind: type[Model], name: str):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(TOKENS, WIDTH)
    low = kind()
    low.load_state_dict(model.state_dict())
    low = scaleprop.prepare_training(low, RECIPES[name], inner="eager")
    for each in (model, low):
        each(x).backward()
    for parameter, other in zip(model.parameters(), low.parameters(), strict=True):
        want, got = parameter.grad, other.grad
        assert (want is None) == (got is None)  # not all are used
        if want is not None and got is not None:
            assert (got - want).norm() <= 2e-3 * want.norm()
