"""What the examples of several processes train: residual blocks under activation checkpointing.

Blocks are compiled one by one, as FSDP2 shards them. Every rank has its part of the same batch, so
any number of processes trains as one does.
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
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import scaleprop

WIDTH, ROWS, STEPS = 64, 32, 8


class Options(argparse.Namespace):
    """The command line."""

    ranks: int
    recipe: str
    inner: Literal["inductor", "eager"]


How = Callable[[Options, Path], list[float]]  # what a rank does, in a folder that all share


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


def launch(how: How, given: Options) -> list[float]:
    """What ``how`` returns on the first of ``given.ranks`` processes, which share a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(functools.partial(_rank, how, given, folder), nprocs=given.ranks)
        return torch.load(folder / "losses.pt")


def _rank(how: How, given: Options, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'ranks'}", rank=rank,
                            world_size=given.ranks)
    losses = how(given, folder)
    if rank == 0:
        torch.save(losses, folder / "losses.pt")
    dist.destroy_process_group()


def options(about: str | None, arguments: Sequence[str] | None) -> Options:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--inner", default="inductor", help="or eager: no compilation")
    parser.add_argument("--short", dest="inner", action="store_const", const="eager",
                        help="the same as --inner eager")
    return parser.parse_args(arguments, namespace=Options())


def compare(
    about: str | None, arguments: Sequence[str] | None, label: str, how: How
) -> dict[str, list[float]]:
    """One process beside what ``how`` does with several: each step's loss, printed and returned."""
    given = options(about, arguments)
    found = {"one process": alone(given),
             f"{label}, {given.ranks} processes": launch(how, given)}
    for name, losses in found.items():
        print(f"{name:20}", *(f"{loss:.5f}" for loss in losses))
    return found
