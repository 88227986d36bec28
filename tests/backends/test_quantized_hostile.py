"""Training by recipe where programs are not plain: passes out of order, repeated, without
gradients; weights used twice; data that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import scaleprop
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.training import training_state

RECIPES = ("nvfp4", "mxfp4-quartet", "fp8-delayed", "ue5m3", "int4-cnn", "e5m7")
CARRIED = ("fp8-delayed", "ue5m3")  # amax, from step to step
ROWS, WIDTH = 32, 32


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).square()))


def prepared(
    recipe: str | TrainingRecipe, make: Callable[[], nn.Module] = Mlp, **options: Any
) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return scaleprop.prepare_training(make(), recipe, inner="eager", **options)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    made = loss(model, x)
    made.backward()
    return [made.detach(), *gradients(model)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


# --- passes out of order --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRIED)
def test_evaluation_leaves_carried_amax_alone(name: str, x: torch.Tensor):
    runs = []
    for evaluates in (False, True):
        model, run = prepared(name), []
        for size in (4.0, 1.0, 2.0):
            run += step(model, x * size)
            if evaluates:
                with torch.no_grad():
                    model(x * 100)
        runs.append(run)
    same(*runs)


def test_what_two_forward_passes_saw_is_kept_whichever_backward_comes_first(x: torch.Tensor):
    """Histories of ``delayed:3``: the largest magnitudes of three steps, for gradients as well."""
    one = Operand(format="e4m3[tensor]*f32", scaling="delayed:3")
    recipe = TrainingRecipe(name="one", description="", high=("head",),
                            operands={"fprop.x": one, "dgrad.dy": one})
    sizes = (1.0, 2.0)
    found = []
    for order in (None, (0, 1), (1, 0)):
        model = prepared(recipe)
        step(model, x)
        if order is None:
            for size in sizes:
                step(model, x * size)
        else:
            losses = [loss(model, x * size) for size in sizes]
            for place in order:
                losses[place].backward()
        step(model, x)
        found.append(training_state(model).state_dict())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in other.items():  # scales of gradients may be of another step: roundings
            torch.testing.assert_close(value, found[0][key], rtol=0.1, atol=0)
    assert sum(value.count_nonzero() == 3 for value in found[1].values()) == 3


@pytest.mark.parametrize("name", CARRIED)
def test_a_resumed_run_may_evaluate_first(name: str, x: torch.Tensor):
    model = prepared(name)
    step(model, x * 4)
    saved = training_state(model).state_dict()
    want = step(model, x)
    model = prepared(name)
    training_state(model).load_state_dict(saved)
    with torch.no_grad():
        model(x)
    again = training_state(model).state_dict()
    assert again.keys() == saved.keys()
    same([again[key] for key in saved], list(saved.values()))
    same(step(model, x), want)


def test_a_state_goes_back_to_the_beginning(x: torch.Tensor):
    model = prepared("fp8-delayed")
    beginning = training_state(model).state_dict()
    want = step(model, x)
    step(model, x * 8)
    training_state(model).load_state_dict(beginning)
    same(step(model, x), want)


class Recomputed(nn.Module):
    """A prepared model under activation checkpointing."""

    def __init__(self, inside: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-tetrajet", "fp8-delayed", "ue5m3"])
def test_a_recomputed_model_takes_the_same_steps(name: str, reentrant: bool, x: torch.Tensor):
    inputs = [(x * size).requires_grad_() for size in (1.0, 4.0, 2.0)]
    plain = prepared(name)
    want = [step(plain, each) for each in inputs]
    model = Recomputed(prepared(name), reentrant)
    for each, expected in zip(inputs, want, strict=True):
        same(step(model, each), expected)


@pytest.mark.parametrize("name", CARRIED)
def test_a_skipped_backward_is_no_amax(name: str, x: torch.Tensor):
    model = prepared(name)
    step(model, x)
    loss(model, x * 2)
    found = step(model, x)
    assert all(value.isfinite().all() for value in found)
