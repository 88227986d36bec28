"""Trains a CNN with 4-bit weights on a CPU, on scikit-learn's digits, and ships it in 4 bits.

    python -m benchmarks.int4_cnn [--seeds 5] [--epochs 30]

Recipe ``int4-cnn`` against float32: the same initial weights, batches and schedule, five seeds.
After every epoch each layer's weights, as its products multiply them, are counted: 15 distinct
values. The trained model is exported to ONNX with packed 4-bit weights and its accuracy there
compared. Exits with 1 where accuracy is more than 0.5 points below, a layer has another number of
values, or the export answers differently.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn

import scaleprop
from benchmarks import harness
from scaleprop.recipes import Recipe, Role
from scaleprop.training import deployable

LIMIT = 0.5  # points of accuracy
LEVELS = 15
INT4 = Role(format="int4[tensor]*f32")
EXPORT = Recipe(name="int4-cnn", description="weights in 15 levels, one scale a tensor",
                roles={"fprop.w": INT4, "conv.w": INT4})


class Cnn(nn.Sequential):
    """Three convolutions, batch norms and a classifier, for images of 8×8."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 2 * 2, 10))


def data(seed: int) -> tuple[torch.Tensor, ...]:
    """Images and classes to train on, and a quarter of them to test on."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16.0
    y = torch.tensor(classes)[order]
    end = len(x) * 3 // 4
    return x[:end], y[:end], x[end:], y[end:]


def levels(model: nn.Module) -> list[int]:
    """How many values the weights of each layer have, as products multiply them."""
    shipped = deployable(model)
    return [len(module.weight.unique()) for module in shipped.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)]


def accuracy(model: object, x: torch.Tensor, y: torch.Tensor) -> float:
    """Per cent."""
    with torch.no_grad():
        found = model(x)  # type: ignore[operator]
    return 100.0 * float((torch.as_tensor(found).argmax(1) == y).float().mean())


def train(recipe: str, seed: int, epochs: int) -> tuple[nn.Module, float, set[int]]:
    """The model, its accuracy on the test set, and the numbers of values its layers had."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model = scaleprop.prepare_training(Cnn(), recipe)
    x, y, test_x, test_y = data(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    steps = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    counts: set[int] = set()
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x), generator=draw)[:steps * 64].split(64):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if recipe == "int4-cnn":
            counts.update(levels(model))
    return model, accuracy(model.eval(), test_x, test_y), counts


def exported(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, int, int]:
    """Accuracy on ONNX Runtime; how many weights are stored two a byte; the file's bytes."""
    compiled = scaleprop.compile(deployable(model), (x,), recipe=EXPORT, backend="onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.export(Path(folder) / "cnn.onnx")
        halves = [-(-layer.weight[0].numel() // 2) * len(layer.weight)  # rows are whole bytes
                  for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        packed = sum(each.data_type == onnx.TensorProto.UINT8 and len(each.raw_data) in halves
                     for each in onnx.load(path).graph.initializer)
        return accuracy(compiled, x, y), packed, Path(path).stat().st_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, export; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    results = harness.Results("int4_cnn", options.results, fresh=True)
    rows: list[list[object]] = []
    gaps: list[float] = []
    right = True
    for seed in range(options.seeds):
        _, exact, _ = train("fp32", seed, options.epochs)
        model, low, counts = train("int4-cnn", seed, options.epochs)
        _, _, x, y = data(seed)
        there, packed, size = exported(model, x, y)
        shipped = accuracy(deployable(model), x, y)
        gaps.append(exact - low)
        right &= counts == {LEVELS} and packed == 4 and there == shipped
        results.add(str(seed), {"float32": exact, "int4": low, "onnxruntime": there,
                                "values": sorted(counts), "packed": packed, "bytes": size})
        rows.append([seed, f"{exact:.2f}", f"{low:.2f}", sorted(counts), packed, f"{there:.2f}",
                     size])
    table = harness.markdown_table(
        ["seed", "float32, %", "int4-cnn, %", "values a layer", "weights two a byte",
         "on ONNX Runtime, %", "bytes"], rows)
    gap = statistics.fmean(gaps)
    text = (f"# A CNN in 4 bits\n\n{harness.machine_line(results.data['machine'])}\n\n{table}\n\n"
            f"int4-cnn is {gap:+.2f} points below float32 on average (at most {LIMIT})")
    results.write_markdown(text)
    print(text)
    return int(not right or gap > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
