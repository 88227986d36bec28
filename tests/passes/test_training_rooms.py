"""Any exponents inside the rooms that formats give: the same training step, casts and all."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.passes.training import Formats, lower
from scaleprop.passes.training.choice import room_for

from .training_graphs import trained

ANGLE = 1e-10  # 1 − cosine: gradients 2^-20 of their amax are subnormal in E5M2 here and there


def away_from_zero(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * x.detach().sign()


class Layers(nn.Module):
    """A residual stream with a norm, and a head."""

    def __init__(self, values: str) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 7)
        self.act = away_from_zero if values == "away" else F.silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.act(x))
        x = x + self.down(self.act(self.up(self.act(self.norm(x)))))
        return F.cross_entropy(self.head(x), torch.arange(len(x)) % 7)


def step(values: str) -> tuple[nn.Module, torch.Tensor]:
    """In float64: no sum is rounded otherwise because of other exponents."""
    torch.manual_seed(0)
    model = Layers(values).double()
    if values == "away":
        for weight in model.parameters():
            weight.data += weight.detach().sign() * weight.detach().abs().max() / 8
    return model, torch.randn(64, 16).double()


def drawn(seed: int, chosen: list[tuple[range, int]]) -> Any:
    """``room_for``, but with one exponent of the room only, drawn at random."""
    draw = random.Random(seed)

    def one(element: str, amax: float, drift: float, margin: int) -> range:
        room = room_for(element, amax, drift, margin)
        exponent = draw.choice(room)
        chosen.append((room, exponent))
        return range(exponent, exponent + 1)

    return one


def turned(got: list[torch.Tensor], want: list[torch.Tensor]) -> torch.Tensor:
    """1 − cosine of each gradient."""
    pairs = [(a.double().flatten(), b.double().flatten())
             for a, b in zip(got[1:], want[1:], strict=True)]
    return torch.stack([1 - torch.cosine_similarity(*pair, dim=0) for pair in pairs])


def at_random(
    model: nn.Module, x: torch.Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Loss and gradients, every value held anywhere in its room."""
    chosen: list[tuple[range, int]] = []
    monkeypatch.setattr(lower, "room_for", drawn(seed, chosen))
    found = trained(model, x, formats=Formats())
    assert len(chosen) == 9 and len({exponent for _, exponent in chosen}) > 3
    assert max(len(room) for room, _ in chosen) > 4
    return found


@pytest.mark.parametrize("seed", range(4))
def test_any_exponents_in_the_rooms_give_the_same_step(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Where products read nothing that is less than 2^-5 of its maximum."""
    model, x = step("away")
    want = trained(model, x, formats=Formats())
    got = at_random(model, x, seed, monkeypatch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    assert turned(got, want).max() <= ANGLE


@pytest.mark.parametrize("seed", range(4))
def test_any_exponents_in_the_rooms_are_as_good(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Values close to zero are rounded to fewer bits at some exponents; gradients are as close to
    exact ones then."""
    model, x = step("near")
    model(x).backward()
    exact = [x, *(p.grad.clone() for p in model.parameters())]
    usual = turned(trained(model, x, formats=Formats()), exact)
    other = turned(at_random(model, x, seed, monkeypatch), exact)
    assert (other / usual).max() < 1.3 and other.mean() < 1.1 * usual.mean()


def test_exponents_outside_of_the_rooms_are_not(monkeypatch: pytest.MonkeyPatch):
    """What the rooms are for: eight above, values are rounded to few bits, or to zero."""
    model, x = step("near")
    model(x).backward()
    exact = [x, *(p.grad.clone() for p in model.parameters())]
    usual = turned(trained(model, x, formats=Formats()), exact)

    def beyond(*given: Any) -> range:
        end = room_for(*given)[-1] + 8
        return range(end, end + 1)

    monkeypatch.setattr(lower, "room_for", beyond)
    other = turned(trained(model, x, formats=Formats()), exact)
    assert other.mean() > 5 * usual.mean()
