"""Loss scaling is torch.amp.GradScaler's: with models in low precision, and with this package's
optimizer state, weights and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scaleprop
from scaleprop import optim


def start(recipe: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    scaleprop.prepare_training(model, recipe, inner="eager")
    return model, torch.randn(24, 16)


def train(recipe: str, scaler: torch.amp.GradScaler, overflow_at: int | None = None,
          steps: int = 6) -> tuple[list[Tensor], list[float]]:
    """(weights at the end, losses); the loss of step ``overflow_at`` is infinite."""
    model, x = start(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        losses.append(loss.item())
        scaler.scale(loss * (math.inf if step == overflow_at else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in model.parameters()], losses


@pytest.mark.parametrize("recipe", ["fp32", "fp8"])
def test_scaling_the_loss_by_a_power_of_two_changes_nothing(recipe: str) -> None:
    """Gradients are cast at scales that follow them, powers of two: exact up and down again."""
    plain = train(recipe, torch.amp.GradScaler("cpu", enabled=False))
    scaled = train(recipe, torch.amp.GradScaler("cpu", init_scale=2.0**14))
    assert scaled[1] == plain[1]
    assert all(torch.equal(a, b) for a, b in zip(scaled[0], plain[0], strict=True))


@pytest.mark.parametrize("recipe", ["fp32", "fp8"])
def test_a_step_that_overflows_is_left_out_and_the_scale_halved(recipe: str) -> None:
    """Casts to FP8 saturate finite values only: what overflowed is still seen at the weights."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    weights, losses = train(recipe, scaler, overflow_at=2, steps=5)
    expected, _ = train(recipe, torch.amp.GradScaler("cpu", init_scale=2.0**14), steps=4)
    assert scaler.get_scale() == 2.0**13
    assert losses[3] == losses[2]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_with_clipping_stored_state_and_bfloat16_weights() -> None:
    """unscale_ before the clip: its statistics are those of true gradients at every scale."""
    learned: list[dict[str, Any]] = []
    for init in (1.0, 2.0**12):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).bfloat16()
        x = torch.randn(24, 16).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optim.stochastic_weights(optimizer, seed=3)
        state = optim.scaled_state(optimizer, "fp16")
        clip = optim.StableClip(model.parameters(), optimizer, reset_every=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=init)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = (model(x) - x).float().square().mean()
            losses.append(loss.item())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip.step()
            scaler.step(optimizer)
            scaler.update()
        assert losses[-1] < losses[0] and not state.left
        learned.append({"losses": losses, "limits": clip.threshold.tolist()})
    assert learned[0] == learned[1]
