"""What the training examples train: a small classifier, and data that it can learn.

Every example takes ``--recipe``, ``--inner``, ``--short`` and ``--out``, trains with gradient
accumulation and clipping, stops in the middle, resumes from its checkpoint, and returns what it
measured. Exponents of ``fp8`` are measured anew where a run is resumed: its last digits differ.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

INPUTS, CLASSES, WIDTH = 32, 4, 64
BATCH, ACCUMULATED, CLIP, RATE = 16, 2, 1.0, 3e-3
STEPS, STOP = 8, 4  # optimizer steps, and after how many of them the run is interrupted


class Classifier(nn.Module):
    """A residual MLP that returns its own loss, so that the whole step is one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(),
                          nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """x: [batch, INPUTS]; labels: [batch] of classes."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        logits = self.last(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier() -> Classifier:
    """The same weights every time."""
    torch.manual_seed(0)
    return Classifier()


def samples(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Points, and in which of CLASSES directions each lies furthest."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(count, INPUTS, generator=draw)
    labels = points[:, :CLASSES].argmax(1)
    return [{"x": x, "labels": label} for x, label in zip(points, labels, strict=True)]


def training_data() -> list[dict[str, Tensor]]:
    """As many samples as all steps take, once each."""
    return samples(STEPS * ACCUMULATED * BATCH, seed=1)


def held_out() -> list[dict[str, Tensor]]:
    """Samples that are not trained on."""
    return samples(4 * BATCH, seed=2)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run returns: each micro-batch's loss without a stop, those after the stop of a run
    that was resumed, and the loss on held-out data."""

    losses: list[float]
    resumed: list[float]
    evaluated: float

    def show(self, recipe: str) -> None:
        """Print it."""
        print(f"{recipe}: loss {self.losses[0]:.4f} → {self.losses[-1]:.4f}, resumed "
              f"{self.resumed[-1]:.4f}, held out {self.evaluated:.4f}")


class Options(argparse.Namespace):
    """What every example is called with."""

    recipe: str
    inner: Literal["inductor", "eager"]
    out: Path


def options(about: str | None, arguments: Sequence[str] | None) -> Options:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--inner", default="inductor", help="or eager: no compilation")
    parser.add_argument("--short", dest="inner", action="store_const", const="eager",
                        help="the same as --inner eager")
    parser.add_argument("--out", type=Path, default=Path("demo/training"), help="for checkpoints")
    return parser.parse_args(arguments, namespace=Options())
