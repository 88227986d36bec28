"""DDP by recipe: halves of a batch on two processes round as one process rounds the whole.

Random bits are of places in the whole batch. Carried amax is agreed on. Scales of ``current`` data
are each rank's own, as in TransformerEngine: there, only the size of the difference is known.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import scaleprop
from scaleprop.recipes.training_named import training_recipe
from scaleprop.training import training_state

from .ranks import WIDTH, alone, together

ROWS, STEPS = 128, 3  # half a batch is whole blocks and rotations of tokens
# scales are of blocks of 32 tokens or of one, so that ranks find the same
EXACT = ("mxfp4-tetrajet", "mxfp4-quartet", "mxfp8", "int4-cnn")
NEAR = ("nvfp4", "ue5m3", "fp8-delayed", "e5m7")  # e5m7 truncates halves of sums


def net(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def steps_of(model: nn.Module) -> list[torch.Tensor]:
    """Gradients of each step, in which the loss is a sum over rows: halves have the same values."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    found: list[torch.Tensor] = []
    for step in range(STEPS):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)) * 2.0**step
        mine = x[rank * ROWS // ranks:(rank + 1) * ROWS // ranks]
        model.zero_grad()
        model(mine).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]) * ranks)
    return found


def trained(recipe: str, buckets: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch._dynamo.reset()
    model: Any = scaleprop.prepare_training(net(), _recipe(recipe), inner="eager")
    if dist.is_initialized():
        if buckets:
            dist._DEFAULT_FIRST_BUCKET_BYTES = 2000  # type: ignore[attr-defined]
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.004 if buckets else 25)  # type: ignore[arg-type]
        found = steps_of(parallel)
        assert recipe == "e5m7" or len(scaleprop.scale_report(model)) == 1 + buckets
    else:
        found = steps_of(model)
    return found, training_state(model).state_dict()


def _recipe(name: str) -> Any:
    recipe = training_recipe(name)
    if name == "ue5m3":  # held from the first step on
        return recipe.replace(**{f"{role}.scaling": "held:2" for role in recipe.operands})
    return recipe


def many(recipes: tuple[str, ...], buckets: bool) -> list[Any]:
    return [trained(recipe, buckets) for recipe in recipes]


@pytest.mark.parametrize("buckets", [False, True])
def test_halves_train_as_the_whole(buckets: bool):
    single = alone(many, EXACT + NEAR, False)
    first, second = together(2, many, EXACT + NEAR, buckets)
    for name, want, got, other in zip(EXACT + NEAR, single, first, second, strict=True):
        for a, b, c in zip(got[0], want[0], other[0], strict=True):
            assert torch.equal(a, c)
            error = (a - b).norm() / b.norm()
            assert error < (1e-6 if name in EXACT else 0.3), (name, error)
        agree(name, want[1], got[1], other[1])


def agree(
    name: str, want: dict[str, torch.Tensor], got: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
) -> None:
    """Assert that the ranks' states are one, and that amax is of the whole batch."""
    assert got.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in got.items())
    # a piece of a model counts each step once, whatever it was compiled with
    steps = {int(value) for key, value in got.items() if key.endswith("|step")}
    assert steps == (set() if name == "e5m7" else {STEPS - 1})
    carried = [key for key in got if key.endswith("0.weight/fprop.x")]
    assert bool(carried) == (name in ("ue5m3", "fp8-delayed"))
    assert all(torch.equal(got[key], want[key]) for key in carried)
