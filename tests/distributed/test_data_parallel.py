"""DDP and FSDP2 train as one process does, sharded checkpoints and recomputation included.

The ranks' rows together are the single process's batch, and exponents are fixed by the largest
magnitude on any rank, which is that of the whole batch: so FP8 rounds the same numbers in the same
way, and what differs is the order in which float32 sums are taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import scaleprop
from scaleprop import Recipe

from .ranks import adamw, alone, net, together, train

STEPS, SAVED = 6, 3
# relative difference of any step's loss; FP8 doubles a difference where a value lies on a tie
TOLERANCE = {"fp32": 1e-5, "fp8": 1e-3}
RECIPES = tuple(TOLERANCE)

Losses = dict[str, list[float]]


def assert_close(found: Losses, expected: Losses) -> None:
    for recipe in found:
        assert len(found[recipe]) == len(expected[recipe])
        torch.testing.assert_close(torch.tensor(found[recipe]), torch.tensor(expected[recipe]),
                                   rtol=TOLERANCE[recipe], atol=0)


# --- one process ---------------------------------------------------------------------------------


def whole(recipe: Any) -> list[float]:
    model = scaleprop.prepare_training(net(recompute=True), recipe, inner="eager")
    return train(model, adamw(model), range(STEPS))


def by_block(recipe: Any) -> list[float]:
    model = net(recompute=True)
    for block in model.blocks:
        scaleprop.prepare_training(block, recipe, inner="eager")
    return train(model, adamw(model), range(STEPS))


# --- many ----------------------------------------------------------------------------------------


def replicated(recipes: Sequence[str] = RECIPES) -> tuple[Losses, dict[str, Any]]:
    """Losses under DDP by recipe, and the exponents of the last one's casts."""
    losses: Losses = {}
    for recipe in recipes:
        model = scaleprop.prepare_training(net(recompute=True), recipe,  # type: ignore[arg-type]
                                           inner="eager")
        parallel = DistributedDataParallel(model)
        losses[recipe] = train(parallel, adamw(parallel), range(STEPS))
        assert parallel.module.state_dict().keys() == net().state_dict().keys()
    (report,) = scaleprop.scale_report(model)
    return losses, {cast.value: cast.exponent for cast in report.casts}


def in_buckets() -> tuple[Losses, int, set[str]]:
    """Losses under DDP with gradients in several buckets: Dynamo cuts the graph into pieces. How
    many, and why their scales are found at run time."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2000  # type: ignore[attr-defined]
    losses: Losses = {}
    for recipe in RECIPES:
        torch._dynamo.reset()
        model = scaleprop.prepare_training(net(), recipe, inner="eager")
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.004)  # type: ignore[arg-type]
        losses[recipe] = train(parallel, adamw(parallel), range(STEPS))
    reports = scaleprop.scale_report(model)
    return losses, len(reports), {cast.why for report in reports for cast in report.casts}


def sharded(recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Blocks compiled one by one, then sharded; so is what is left."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = net(recompute=True)
    for block in model.blocks:
        fully_shard(scaleprop.prepare_training(block, recipe, inner="eager"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def fully_sharded(folder: Path, recipes: Sequence[str] = RECIPES) -> tuple[Losses, Losses]:
    """Losses under FSDP2, without a stop and with one."""
    straight: Losses = {}
    resumed: Losses = {}
    for recipe in recipes:
        model, optimizer = sharded(recipe)  # type: ignore[arg-type]
        assert all(p.to_local().numel() < p.numel() for p in model.parameters())  # type: ignore[operator]
        straight[recipe] = train(model, optimizer, range(SAVED))
        save(model, optimizer, folder / recipe)
        straight[recipe] += train(model, optimizer, range(SAVED, STEPS))
        model, optimizer = sharded(recipe)  # type: ignore[arg-type]
        load(model, optimizer, folder / recipe)
        resumed[recipe] = train(model, optimizer, range(SAVED, STEPS))
        reports = [scaleprop.scale_report(block) for block in model.blocks]  # type: ignore[union-attr]
        assert [len(each) for each in reports] == [recipe == "fp8"] * 2
    return straight, resumed


@pytest.fixture(scope="module")
def single() -> dict[str, Losses]:
    return {task.__name__: {recipe: alone(task, recipe) for recipe in RECIPES}
            for task in (whole, by_block)}


def test_one_process_trains(single: dict[str, Losses]) -> None:
    for losses in itertools.chain.from_iterable(found.values() for found in single.values()):
        assert all(late < 0.95 * early for early, late in zip(losses, losses[3:], strict=False))
    for exact, low in itertools.pairwise(single["whole"].values()):
        assert exact != low
        torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=0.03, atol=0)


def test_replicas_train_as_one_process(single: dict[str, Losses]) -> None:
    (losses, exponents), (others, same) = together(2, replicated)
    assert losses == others and exponents == same
    assert any(exponent is not None for exponent in exponents.values())
    assert_close(losses, single["whole"])


def test_gradients_in_buckets(single: dict[str, Losses]) -> None:
    (losses, pieces, reasons), _ = together(2, in_buckets)
    assert pieces > 3 and reasons == {"of unknown size"}
    torch.testing.assert_close(torch.tensor(losses["fp32"]), torch.tensor(single["whole"]["fp32"]),
                               rtol=TOLERANCE["fp32"], atol=0)
    # other scales than those of the single process: another rounding
    torch.testing.assert_close(torch.tensor(losses["fp8"]), torch.tensor(single["whole"]["fp8"]),
                               rtol=0.03, atol=0)


def test_shards_train_and_resume_as_one_process(single: dict[str, Losses], tmp_path: Path) -> None:
    for straight, resumed in together(2, fully_sharded, tmp_path):
        assert_close(straight, single["by_block"])
        assert resumed["fp32"] == straight["fp32"][SAVED:]
        # exponents are measured anew, on the batch after the stop
        torch.testing.assert_close(torch.tensor(resumed["fp8"]),
                                   torch.tensor(straight["fp8"][SAVED:]), rtol=0.03, atol=0)


def both() -> tuple[Losses, Losses]:
    model, optimizer = sharded("fp8")
    return replicated(["fp8"])[0], {"fp8": train(model, optimizer, range(STEPS))}


def test_four_ranks(single: dict[str, Losses]) -> None:
    for replicas, shards in together(4, both):
        assert_close(replicas, single["whole"])
        assert_close(shards, single["by_block"])
