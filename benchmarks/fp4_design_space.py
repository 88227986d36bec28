"""Trains a small language model by FP4 recipes: formats, rounding, rotation, tensor scaling.

    python -m benchmarks.fp4_design_space [--seeds 1] [--jobs 1] [--store fp4.sqlite]

Two Llama blocks of width 64 on the bytes of the standard library's source, 150 steps of 512 tokens.
Every product of a linear layer but the head is in FP4, forward and backward. Runs that are in the
store are not run again. Costs are those of layers of an 8B model. Writes
``results/fp4_design_space.csv`` and the picture ``docs/fp4_design_space.svg``, which
``docs/fp4-design-space.md`` reads.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import scaleprop
from benchmarks import harness
from examples import language_model
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe
from scaleprop.sweeps.tables import EFFECT_COLUMNS, effect_rows

SETTINGS = language_model.Settings(vocabulary=256, width=64, layers=2, context=64, batch=8,
                                   steps=150, rate=4e-3)
SHAPES = [(8192, 12288, 4096), (8192, 4096, 12288), (8192, 4096, 4096)]  # tokens, outputs, inputs
BASE = TrainingRecipe(name="fp4", description="FP4 forward and backward, but for the head",
                      operands=dict.fromkeys(OPERANDS[:6], Operand(format="nvfp4")))
AXES = {
    "*.format": ["mxfp4", "mxfp4:rceil", "nvfp4", "fp4_ue5m3"],
    "gradients": {
        "nearest": {},
        "stochastic": {"*.dy.rounding": "stochastic:8"}},
    "rotation": {
        "none": {},
        "wgrad": {"wgrad.*.hadamard": 16, "wgrad.*.signs": "fixed"},
        "backward": {"wgrad.*.hadamard": 16, "wgrad.*.signs": "step", "dgrad.*.hadamard": 16,
                     "dgrad.*.signs": "step"}},
    "*.scaling": ["current", "held:50"],
    "input of wgrad": {
        "nearest": {},
        "stochastic": {"wgrad.x.rounding": "stochastic:8"}},
}


def factory() -> torch.nn.Module:
    """The model, which returns its loss."""
    return language_model.Language(SETTINGS)


def text() -> torch.Tensor:
    """Bytes of the standard library's modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))),
                        dtype=torch.int64)


def data(seed: int) -> Iterator[torch.Tensor]:
    """Batches of the first nine tenths."""
    return language_model.batches(language_model.split(text())[0], seed, SETTINGS)


def held_out() -> list[torch.Tensor]:
    """Batches of the last tenth."""
    found = language_model.batches(language_model.split(text())[1], 0, SETTINGS)
    return [next(found) for _ in range(32)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--store", type=Path, default=Path("fp4.sqlite"))
    parser.add_argument("--redo", action="store_true", help="run again what the store has")
    parser.add_argument("--plot", type=Path,
                        default=harness.ROOT / "docs" / "fp4_design_space.svg")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    found = scaleprop.sweep(
        "benchmarks.fp4_design_space:factory", "benchmarks.fp4_design_space:data", BASE, AXES,
        validation="benchmarks.fp4_design_space:held_out", seeds=options.seeds,
        steps=SETTINGS.steps, learning_rate=SETTINGS.rate, clip=1.0, options={"inner": "eager"},
        shapes=SHAPES, path=options.store, fresh=options.redo,
        jobs=options.jobs)
    found.to_csv(options.results / "fp4_design_space.csv")
    found.plot(options.plot)
    print(found.table())
    two_levels = AXES["*.format"][2:]
    rows = [(name, *cells) for name in two_levels
            for cells in effect_rows(found, {"*.format": name}) if cells[0] == "*.scaling"]
    print("Tensor scaling, within a format:\n")
    print(harness.markdown_table(["within", *EFFECT_COLUMNS], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
