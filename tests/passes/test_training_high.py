"""Which layers a recipe keeps high, and truncation of every value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.formats.elements import element
from scaleprop.formats.quantize import representable
from scaleprop.ops.steps import truncate
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

FP8 = Operand(format="e4m3[tensor]*f32")


class Blocks(nn.Module):
    """Three blocks of two residual branches, two layers each; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(F.layer_norm(x, [16]))))
        return self.head(x).square().mean()


class Experts(nn.Module):
    """Each token's better expert of two, told by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router, self.head = (nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 1))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).tanh()
        weight, chosen = self.router(x).softmax(-1).topk(1)
        both = torch.stack([expert(x) for expert in self.experts], 1)
        x = both.gather(1, chosen.unsqueeze(-1).expand(-1, 1, 8)).squeeze(1) * weight
        return self.head(x).square().mean()


def low_layers(model: nn.Module, high: tuple[str, ...]) -> set[str]:
    recipe = TrainingRecipe(name="fp8-x", description="", high=high, operands=dict.fromkeys(
        ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"), FP8))
    made = scaleprop.prepare_training(model, recipe, inner="eager")
    made(torch.randn(32, 8)).backward()
    (report,) = made.scale_report()
    # every product of a layer is high, or none
    by_layer: dict[str, set[str]] = {}
    for each in report.quantized:
        by_layer.setdefault(each.layer, set()).add(each.role)
    assert all("dgrad.dy" in roles or "wgrad.dy" in roles for roles in by_layer.values())
    return {name.removesuffix(".weight") for name in by_layer}


EVERY = {"enter", "head", *(f"{way}.{place}" for way in ("up", "down") for place in range(6))}


@pytest.mark.parametrize(("high", "without"), [
    ((), set()),
    (("head",), {"head"}),
    (("first:1",), {"up.0", "down.0"}),
    (("first:2", "head"), {"up.0", "down.0", "up.1", "down.1", "head"}),
    (("last:3",), {f"{way}.{place}" for way in ("up", "down") for place in (3, 4, 5)}),
    (("last:9",), EVERY - {"enter", "head"}),
])
def test_layers_are_kept_high_by_where_they_are(high: tuple[str, ...], without: set[str]):
    assert low_layers(Blocks(), high) == EVERY - without


def test_layers_in_a_row_are_branches_of_their_own():
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x.square().mean()

    assert low_layers(Row(), ("last:1", "first:2")) == {"layers.2"}


def test_a_router_is_what_experts_are_chosen_by():
    everything = {"enter", "router", "head", "experts.0", "experts.1"}
    assert low_layers(Experts(), ()) == everything
    assert low_layers(Experts(), ("router",)) == everything - {"router"}


@pytest.mark.parametrize("name", ["e5m7", "e4m3", "e8m7", "e5m2", "e2m1", "e3m5"])
def test_truncation_is_the_next_value_toward_zero(name: str):
    values = torch.tensor([value for value in representable(element(name)) if value >= 0.0],
                          dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=draw) * 10.0**power for power in range(-6, 5)])
    below = values[torch.searchsorted(values, x.double().abs(), right=True) - 1]
    assert torch.equal(truncate(x, name).double(), torch.copysign(below, x.double()))


def test_truncation_keeps_nan_and_infinity_and_saturates():
    x = torch.tensor([math.nan, math.inf, -1e9, 0.0, -0.0])
    got = truncate(x, "e4m3")
    assert got[0].isnan() and got[1:].tolist() == [math.inf, -448.0, 0.0, -0.0]
    assert got[4].signbit()


def test_bfloat16_truncation_is_cutting_off_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    cut = (x.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(truncate(x, "e8m7"), cut)


def test_every_value_of_a_step_is_truncated():
    torch.manual_seed(0)
    model = scaleprop.prepare_training(Blocks(), training_recipe("e8m3"), inner="eager")
    loss = model(torch.randn(32, 8))
    loss.backward()
    exact = Blocks()
    exact.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, truncate(parameter.grad, "e8m3")), name
    assert torch.equal(loss, truncate(loss, "e8m3"))
