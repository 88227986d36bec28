"""A model and data that train in no time, as a user's module would have them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import scaleprop
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe
from scaleprop.sweeps import Sweep
from scaleprop.sweeps.runs import Outcome
from scaleprop.sweeps.store import Store

BASE = TrainingRecipe(name="base", description="", high=(),
                      operands=dict.fromkeys(OPERANDS[:6], Operand(format="mxfp8")))
FAST = {"inner": "eager"}
AXES = {"*.format": ["mxfp8", "mxfp4"], "high": [(), ("head",)]}


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - y).square().mean()


def factory() -> nn.Module:
    return Model()


def unmade() -> nn.Module:
    raise RuntimeError("no model today")


def sized(width: int) -> nn.Module:
    return Model(width)


def dropping() -> nn.Module:
    model = Model()
    model.layers.append(nn.Dropout(0.5))
    return model


def standing(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def data(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(32, 32, generator=draw)
        yield x, x.cumsum(1) / 6


def held_out() -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = data(1000)
    return [next(source) for _ in range(2)]


def short(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Starts anew."""
    source = data(seed)
    return [next(source) for _ in range(2)]


def ended(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return iter(short(seed))


def killed(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Kills its process in the middle of the third run, once."""
    marks = Path(os.environ["SWEEP_MARKS"])
    count = len(list(marks.iterdir()))
    (marks / str(count)).touch()
    for step, batch in enumerate(data(seed)):
        if count == 3 and step == 2:  # the first use reads shapes only
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def explosive(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e30)


def scheduled(model: nn.Module) -> tuple[torch.optim.Optimizer, object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))


def squared(model: Model, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 2 * model(*batch)


def broken(model: nn.Module) -> torch.optim.Optimizer:
    raise RuntimeError("no optimizer today")


def run(path: Path | str | None = None, **changes: Any) -> Sweep:
    """A small sweep, some of whose arguments are others."""
    arguments = {"factory": factory, "data": data, "recipe": BASE, "axes": AXES, "steps": 4,
                 "learning_rate": 1e-2, "options": FAST, "path": path, "progress": False}
    return scaleprop.sweep(**{**arguments, **changes})


def outcomes_in(path: Path) -> dict[str, Outcome]:
    store = Store(path)
    try:
        return store.outcomes()
    finally:
        store.close()
