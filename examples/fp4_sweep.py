"""Which FP4 training recipe loses least, and what does each choice do?

    python -m examples.fp4_sweep            # writes demo/fp4_sweep/: runs, table, page
    python -m examples.fp4_sweep --short    # two combinations, four steps

Every combination of the axes trains the same classifier. Finished runs are kept: stopped and called
again, it goes on. ``scaleprop sweep`` does the same from a TOML file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

import scaleprop
from examples import small_task

AXES = {
    "*.format": ["mxfp4", "nvfp4"],  # of all six factors: fprop, dgrad and wgrad
    "gradients": {"nearest": {}, "stochastic": {"*.dy.rounding": "stochastic:8"}},
    "rotation": {"none": {"wgrad.*.hadamard": 0, "wgrad.*.signs": "none"},
                 "wgrad": {"wgrad.*.hadamard": 16, "wgrad.*.signs": "fixed"}},
}
SHORT = {"*.format": AXES["*.format"]}
# costs are those of layers worth quantizing: tokens, outputs, inputs
LAYERS = [(8192, 12288, 4096), (8192, 4096, 12288)]


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """What training sees, a seed's own samples, again and again."""
    data = small_task.samples(1024, seed)
    while True:
        yield from DataLoader(data, small_task.BATCH)  # type: ignore[arg-type]


def held_out() -> list[dict[str, Tensor]]:
    """Samples that no seed trains on."""
    return list(DataLoader(small_task.samples(512, seed=1000), 64))  # type: ignore[arg-type]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of one batch."""
    return model(**batch)["loss"]


def main(arguments: Sequence[str] | None = None) -> scaleprop.Sweep:
    """Train by every combination; the table goes to the terminal, all of it to a page."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("demo/fp4_sweep"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    found = scaleprop.sweep(
        small_task.classifier, batches, "nvfp4", SHORT if given.short else AXES,
        loss=loss, validation=held_out, clip=small_task.CLIP,
        learning_rate=small_task.RATE, seeds=1 if given.short else 3,
        steps=4 if given.short else 100,
        shapes=LAYERS,
        options={"inner": "eager"},  # so small a model is trained before it would be compiled
        path=given.out / f"{'short' if given.short else 'runs'}.sqlite")
    found.show()  # gaps to bfloat16 beside what they cost hardware; what each choice does
    found.to_csv(given.out / "table.csv")
    found.plot(given.out / "page.html")
    print(f"wrote {given.out}")
    return found


if __name__ == "__main__":
    main()
