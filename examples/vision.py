"""A small CNN on scikit-learn's digits, shipped in 8 and 4 bits: accuracy before and after.

    python -m examples.vision            # writes demo/vision/
    python -m examples.vision --short    # a few epochs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import scaleprop
from scaleprop import Recipe, Role

BATCH = 64
INT4 = Recipe(name="int4-everywhere", description="weights in INT4, a scale a channel",
              roles=dict.fromkeys(("fprop.w", "conv.w"), Role(format="int4[row]*f32")))


def cnn() -> nn.Sequential:  # for images of 8×8
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [count, 1, 8, 8] and classes: to train on, and a quarter to test on."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y, end = torch.tensor(classes)[order], len(images) * 3 // 4
    return (x[:end], y[:end]), (x[end:], y[end:])


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> float:  # per cent
    return 100 * float((torch.as_tensor(model(x)).argmax(1) == y).float().mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracy on the test set, by recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("demo/vision"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    model, ((x, y), test) = cnn(), data()
    train(model, x, y, epochs=2 if given.short else 20)
    found, seen = {"float32": accuracy(model.eval(), *test)}, list(x[:4 * BATCH].split(BATCH))
    for recipe, name in (("int8", "int8"), (INT4, INT4.name)):
        compiled = scaleprop.compile(model, seen[0], recipe=recipe, calibration=seen)
        path = compiled.export(given.out / f"{name}.onnx")
        found[name] = accuracy(compiled, *test)
        print(f"{name:16} {found['float32']:.1f} % → {found[name]:.1f} %, "
              f"{path.stat().st_size / 1e3:.0f} kB")
    return found


if __name__ == "__main__":
    main()
