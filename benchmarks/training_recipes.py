"""Trains a small Llama by every recipe: loss gap to BF16, and what a step takes.

    python -m benchmarks.training_recipes [--seeds 3] [--steps 240] [--recipes mxfp8,nvfp4,…]
                                          [--redo] [--plot docs/training_recipes.svg]

The model and text of ``examples/train_lm``, under bfloat16 autocast but for ``fp32``. The recipes
of a seed start from the same weights and see the same tokens. Gap: of the validation loss at the
end to that of ``bf16`` with the same seed, mean and standard error over seeds. Step time, forward
and backward: ÷ that of ``bf16``, steps of both in turns, medians. ``mus-fp8`` is for models of
another function, and is compared with ``mus-bf16``: that function in bfloat16. Recipes that are
done are not run again unless ``--redo`` says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import scaleprop
from benchmarks import harness
from examples import language_model
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe

BASELINE = "bf16"
SETTINGS = language_model.Settings()
MUS = {"mus-bf16": "bf16", "mus-fp8": "mus-fp8"}  # of unit_scale(scheme="mus")
MUS_RATE = 0.1  # half and twice that are worse
# int4-cnn is for convolutions
RECIPES = ("fp32", "fp8", "fp8-current", "fp8-delayed", "fp8-block", "fp8-amax", "fp8-cscale",
           "mxfp8", "mxfp6", "mxfp4-tseng", "mxfp4-tetrajet", "mxfp4-quartet", "mxfp4-plain",
           "nvfp4", "nvfp4-quartet2", "ue5m3", "fp4-all-the-way", *MUS)


def recipe_of(name: str) -> language_model.Recipe:
    """A named recipe; ``mxfp4-plain``: MXFP4 rounded to nearest, nothing rotated."""
    if name in MUS:
        return language_model.Recipe(MUS[name], "mus")
    if name != "mxfp4-plain":
        return language_model.Recipe(name)
    return language_model.Recipe(TrainingRecipe(
        name=name, description="MXFP4, nearest, no rotation",
        operands=dict.fromkeys(OPERANDS[:6], Operand(format="mxfp4"))))


def baseline_of(name: str) -> str:
    """What a recipe's loss and step are compared with: the same function in bfloat16."""
    return "mus-bf16" if name == "mus-fp8" else BASELINE


def rate_of(name: str) -> float:
    """The largest learning rate."""
    return MUS_RATE if name in MUS else SETTINGS.rate


def run(
    name: str, seeds: int, text: torch.Tensor, settings: language_model.Settings
) -> dict[str, Any]:
    """Train a model a seed: validation losses at the end; and the time of a step."""
    recipe = recipe_of(name)
    settings = dataclasses.replace(settings, rate=rate_of(name))
    seen, held_out = language_model.split(text)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=name != "fp32")
    with mixed:
        model, starts = language_model.prepared(recipe, seeds, seen, settings)
        losses: list[float] = []
        for seed, start in enumerate(starts):
            model.load_state_dict(start)
            found = language_model.train(model, recipe, (name, seed), seen, held_out, settings)
            losses.append(found.validation[-1][1])
    base, ids = baseline_of(name), next(language_model.batches(seen, 0, settings))
    with mixed:
        other = recipe_of(base).change(language_model.Language(settings), ids)
    baseline = scaleprop.prepare_training(other, recipe_of(base).precision)
    steps = {base: stepper(baseline, ids), name: stepper(model, ids, name != "fp32")}
    timings = harness.measure(steps, harness.Plan(rounds=9))
    return {"losses": losses, "steps": settings.steps, "rate": settings.rate,
            "threads": torch.get_num_threads(), "timings": {
                each: timing.to_dict() for each, timing in timings.items()}}


def stepper(model: torch.nn.Module, ids: torch.Tensor, mixed: bool = True) -> Callable[[], object]:
    """Forward and backward of one batch."""

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(ids)
        loss.backward()

    step()
    return step


def gaps(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Mean of the relative gaps and its standard error, per cent."""
    each = [100.0 * (loss / other - 1.0)
            for loss, other in zip(row["losses"], base["losses"], strict=False)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return statistics.fmean(each), error


def table(results: harness.Results) -> str:
    """Markdown, the smallest gap first."""
    rows: list[tuple[float, list[object]]] = []
    for name, row in results.sections.items():
        base = baseline_of(name)
        gap, error = gaps(row, results.sections[base])
        timings = {key: harness.Timing.from_dict(one) for key, one in row["timings"].items()}
        ratio: object = "1" if name == base else harness.speedup(
            timings[base], timings[name], "wall")
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        rows.append((gap, [name, losses, f"{gap:+.2f} ± {error:.2f}", ratio]))
    header = ["recipe", "validation loss, each seed", "gap to bf16, % (mus-fp8: to mus-bf16)",
              "step ÷ bf16's"]
    body = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return "\n".join(["# Training recipes on a small language model", "",
                      f"Machine: {harness.machine_line(results.data['machine'])}", "",
                      harness.markdown_table(header, body)])


def plot(results: harness.Results, path: Path) -> None:
    """Gaps with their standard errors, one bar a recipe, ``mus`` apart."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaleprop"  # the same picture for the same numbers
    from matplotlib import pyplot

    found = sorted((*gaps(row, results.sections[baseline_of(name)]), name)
                   for name, row in results.sections.items()
                   if name != BASELINE and name not in MUS)  # whose seeds differ by more than these
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.barh([name for *_, name in found], [gap for gap, *_ in found],
              xerr=[error for _, error, _ in found], color="C0")
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set(xlabel="validation loss, gap to BF16, %")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, time, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    settings = dataclasses.replace(SETTINGS, steps=options.steps)
    results = harness.Results("training_recipes", options.results, options.redo)
    text = language_model.tokens(settings.vocabulary)
    wanted = options.recipes.split(",")
    for name in dict.fromkeys((BASELINE, *map(baseline_of, wanted), *wanted)):
        done = results.sections.get(name)
        if done is None or len(done["losses"]) < options.seeds or (
                done["steps"], done["rate"]) != (settings.steps, rate_of(name)):
            results.add(name, run(name, options.seeds, text, settings))
        results.write_markdown(table(results))
    print(table(results))
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
