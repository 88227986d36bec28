"""FSDP2 on this machine's processes, with a sharded checkpoint half-way, against one process.

    python -m examples.train_fsdp2 [--ranks 2] [--recipe fp8] [--short]

Prepare first, then shard: FSDP2 shards the blocks one by one, so they are compiled one by one.
Exponents of ``fp8`` are no part of a checkpoint: behind it they are those of the first batch there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples import small_ranks
from examples.small_ranks import STEPS, Model, Options, adamw, train

STOP = STEPS // 2


def sharded(given: Options) -> Model:
    """Every rank has its part of each parameter."""
    model = small_ranks.by_block(given)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def interrupted(given: Options, folder: Path) -> list[float]:
    """Go on half-way from a sharded checkpoint."""
    model = sharded(given)
    optimizer = adamw(model)
    losses = train(model, optimizer, range(STOP))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")

    model = sharded(given)
    optimizer = adamw(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return losses + train(model, optimizer, range(STOP, STEPS))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Losses by what trained."""
    return small_ranks.compare(__doc__, arguments, "FSDP2", interrupted)


if __name__ == "__main__":
    main()
