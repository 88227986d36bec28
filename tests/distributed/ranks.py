"""Processes of a distributed run on this machine, and the small model that they train."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS, LABELS = 32, 16, 4
# processes are forks of one that has imported this, and has run nothing
multiprocessing.set_forkserver_preload(["tests.distributed.imported"])


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between two projections. recompute: blocks run under activation checkpointing."""

    def __init__(self, depth: int = 2, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.last = nn.Linear(WIDTH, LABELS)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.last(x)


def net(depth: int = 2, recompute: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(depth, recompute)


def batches(steps: range) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of each step's batch, which is the same whatever the number of ranks, and
    the same again three steps later."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for step in steps:
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step % 3 + 1))
        yield x[mine], x[mine, :LABELS].sin()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Each step's loss, over all ranks."""
    losses: list[float] = []
    for x, y in batches(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(mean_over_ranks(loss.detach()))
    return losses


def mean_over_ranks(value: Tensor) -> float:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def alone(task: Callable[..., Any], *arguments: Any) -> Any:
    """What ``task`` returns in this process."""
    torch._dynamo.reset()
    return task(*arguments)


def together(ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``task`` returns on each of ``ranks`` gloo processes, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(_rank, ranks, Path(folder), task, arguments)
        spawn(run, ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
                for rank in range(ranks)]


def spawn(run: Callable[..., None], nprocs: int) -> None:
    """``torch.multiprocessing.spawn`` of forks, which need not import anything."""
    mp.start_processes(run, nprocs=nprocs, start_method="forkserver")


def _rank(
    ranks: int, folder: Path, task: Callable[..., Any], arguments: tuple[Any, ...], rank: int
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank,
                            world_size=ranks)
    try:
        torch.save(task(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
