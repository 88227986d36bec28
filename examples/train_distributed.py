"""DDP and FSDP2 on this machine's processes, against one process.

    python -m examples.train_distributed [--ranks 2] [--recipe fp8]

Blocks run under activation checkpointing. FSDP2 shards the blocks one by one, so they are compiled
one by one; its sharded checkpoint is loaded again half-way.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import scaleprop

WIDTH, ROWS, STEPS, STOP = 64, 32, 8, 4


class Options(argparse.Namespace):
    """The command line."""

    ranks: int
    recipe: Literal["fp32", "fp8"]
    inner: Literal["inductor", "eager"]


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks whose activations are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Each step's loss over all ranks, each of which has its part of the same batch."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    losses: list[float] = []
    for step in steps:
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step + 1))[mine]
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """After sharding: it keeps state of what the parameters then are."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def by_block(given: Options) -> Model:
    """A model whose blocks are compiled one by one."""
    model = Model()
    for block in model.blocks:
        scaleprop.prepare_training(block, given.recipe, inner=given.inner)
    return model


def alone(given: Options) -> list[float]:
    """One process."""
    model = by_block(given)
    return train(model, adamw(model), range(STEPS))


def replicated(given: Options, folder: Path) -> list[float]:
    """DDP: every rank has the whole model."""
    model = DistributedDataParallel(by_block(given))
    return train(model, adamw(model), range(STEPS))


def sharded(given: Options) -> Model:
    """FSDP2: every rank has its part of each parameter."""
    model = by_block(given)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def interrupted(given: Options, folder: Path) -> list[float]:
    """FSDP2, going on half-way from a sharded checkpoint."""
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


def _rank(
    how: Callable[[Options, Path], list[float]], given: Options, folder: Path, rank: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / how.__name__}", rank=rank,
                            world_size=given.ranks)
    losses = how(given, folder)
    if rank == 0:
        torch.save(losses, folder / f"{how.__name__}.pt")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Losses by what trained."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--inner", default="inductor", help="or eager: no compilation")
    given = parser.parse_args(arguments, namespace=Options())
    found = {"one process": alone(given)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for how, label in ((replicated, "DDP"), (interrupted, "FSDP2")):
            mp.spawn(functools.partial(_rank, how, given, folder), nprocs=given.ranks)
            found[f"{label}, {given.ranks} processes"] = torch.load(folder / f"{how.__name__}.pt")
    for label, losses in found.items():
        print(f"{label:20}", *(f"{loss:.5f}" for loss in losses))
    return found


if __name__ == "__main__":
    main()
