"""Exponents are fixed on one batch; weights and losses that grow or shrink afterwards still fit."""

from __future__ import annotations

import copy

import pytest
import torch

import scaleprop


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Linear(32, 64), torch.nn.Linear(64, 10)
        self.blocks = torch.nn.Sequential(*(Block(64) for _ in range(3)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(self.blocks(self.embed(x))), labels)


def step(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], factor: float
) -> tuple[float, torch.Tensor]:
    """Loss, and the gradients of loss · factor in one vector, divided by it."""
    model.zero_grad()
    loss = model(*batch)
    (loss * factor).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), torch.cat([each.flatten() for each in found]) / factor


@pytest.mark.parametrize(("grown", "factor", "cosine"), [
    (1.0, 1.0, 0.99), (32.0, 1.0, 0.99), (1 / 32, 1.0, 0.99), (1.0, 2.0**8, 0.99),
    (1.0, 2.0**-8, 0.99), (1.0, 2.0**16, 0.9),  # the last: what GradScaler starts with
])
def test_sizes_may_change_after_the_first_batch(
    grown: float, factor: float, cosine: float
) -> None:
    torch.manual_seed(0)
    model = Model()
    batch = torch.randn(128, 32), torch.randint(0, 10, (128,))
    prepared = scaleprop.prepare_training(copy.deepcopy(model), "fp8", inner="eager")
    prepared(*batch).backward()
    with torch.no_grad():
        for each in (model, prepared):
            each.get_parameter("blocks.1.up.weight").mul_(grown)
    loss, exact = step(model, batch, factor)
    found, gradients = step(prepared, batch, factor)
    assert found == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(exact, gradients, 0) > cosine
    assert 0.8 < gradients.norm() / exact.norm() < 1.25
