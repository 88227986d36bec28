"""Does the best learning rate of a narrow model stay the best of a wide one?

    python -m benchmarks.learning_rate_transfer [--widths 128,512] [--recipes fp32,u-mup-fp32]
                                                [--steps 80] [--seeds 2] [--plot FILE]

The model and text of ``examples/train_lm.py``, two layers. Every learning rate of a grid (factors
of two) trains every width. The best rate is the lowest point of the parabola through the grid's
lowest validation loss and its neighbours, over log2 of the rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from examples import language_model

MOST = 2.0  # the best rates' ratio, widest to narrowest
GRIDS: Mapping[str, tuple[int, ...]] = {  # log2 of the learning rates
    "fp32": tuple(range(-11, -5)),
    "u-mup-fp32": tuple(range(-3, 3)),
}


def final_losses(
    recipe: str, settings: language_model.Settings, exponents: Sequence[int], seeds: int, text: Any
) -> dict[int, float]:
    """Mean validation loss at the end of training, for every log2 of the learning rate."""
    seen, held_out = language_model.split(text)
    model, starts = language_model.prepared(language_model.RECIPES[recipe], seeds, seen, settings)
    found: dict[int, float] = {}
    for exponent in exponents:
        tried = dataclasses.replace(settings, rate=2.0**exponent)
        losses: list[float] = []
        for seed, start in enumerate(starts):
            model.load_state_dict(start)
            run = language_model.train(model, language_model.RECIPES[recipe], (recipe, seed), seen,
                                 held_out, tried)
            losses.append(run.validation[-1][1])
        found[exponent] = statistics.fmean(losses)
    return found


def best_exponent(losses: Mapping[int, float]) -> float:
    """Where the parabola through the lowest loss and its neighbours is lowest.

    Raises:
        ValueError: where the lowest loss is at an end of the grid, or no loss is finite.
    """
    finite = {key: loss for key, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("no learning rate gave a finite loss")
    middle = min(finite, key=finite.__getitem__)
    if middle - 1 not in finite or middle + 1 not in finite:
        raise ValueError(f"the best learning rate, 2^{middle}, is at an end of the grid: widen it")
    low, lowest, high = (finite[middle + step] for step in (-1, 0, 1))
    return middle + (low - high) / (2 * (low - 2 * lowest + high))


def shift(by_width: Mapping[str, Mapping[str, float]]) -> float:
    """The best rate at the widest ÷ at the narrowest."""
    best = [best_exponent({int(key): loss for key, loss in by_width[width].items()})
            for width in sorted(by_width, key=int)]
    return 2.0 ** (best[-1] - best[0])


def _best(losses: Mapping[str, float]) -> str:
    try:
        return f"{2.0 ** best_exponent({int(key): loss for key, loss in losses.items()}):.3g}"
    except ValueError as error:
        return str(error)


def _shift(by_width: Mapping[str, Mapping[str, float]]) -> str:
    try:
        return f"{shift(by_width):.2f}"
    except ValueError:
        return "not found"


def table(results: harness.Results) -> str:
    """Markdown."""
    lines = ["# Learning rates across widths", "",
             f"Machine: {harness.machine_line(results.data['machine'])}", ""]
    for recipe, section in results.sections.items():
        by_width = section["losses"]
        exponents = sorted({int(key) for losses in by_width.values() for key in losses})
        body = [[width, *(f"{losses[str(key)]:.3f}" for key in exponents), _best(losses)]
                for width, losses in by_width.items()]
        lines += [f"## {recipe}", "", f"{section['steps']} steps, {section['seeds']} seeds; "
                  f"best rate, widest ÷ narrowest: {_shift(by_width)}", "",
                  harness.markdown_table(
                      ["width", *(f"2^{key}" for key in exponents), "best rate"], body), ""]
    return "\n".join(lines)


def plot(results: harness.Results, path: Path) -> None:
    """Validation loss over learning rate, one line a width, one panel a recipe."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaleprop"  # the same picture for the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results.sections), figsize=(9, 3.6),
                                     layout="constrained", squeeze=False)
    for axes, (recipe, section) in zip(panels[0], results.sections.items(), strict=True):
        for width, losses in section["losses"].items():
            rates = [2.0 ** int(key) for key in losses]
            axes.plot(rates, list(losses.values()), marker=".", label=f"width {width}")
        lowest = min(min(losses.values()) for losses in section["losses"].values())
        axes.set(title=recipe, xlabel="learning rate", ylabel="validation loss, nats a token",
                 ylim=(lowest - 0.1, lowest + 1.5))
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where u-µP's best rate moves by more than ``MOST``.

    Raises:
        ValueError: where it lies at an end of the grid.
    """
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="128,512")
    parser.add_argument("--recipes", default=",".join(GRIDS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="write a picture")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    results = harness.Results("learning_rate_transfer", options.results)
    settings = language_model.Settings(layers=2, steps=options.steps)
    text = language_model.tokens(settings.vocabulary)
    for recipe in options.recipes.split(","):
        losses = {width: {str(key): loss for key, loss in final_losses(
            recipe, dataclasses.replace(settings, width=int(width)), GRIDS[recipe], options.seeds,
            text).items()} for width in options.widths.split(",")}
        results.add(recipe, {"steps": options.steps, "seeds": options.seeds, "losses": losses})
        results.write_markdown(table(results))
    print(table(results))
    if options.plot:
        plot(results, options.plot)
    shifts = [shift(section["losses"]) for recipe, section in results.sections.items()
              if recipe.startswith("u-mup")]
    return 0 if shifts and all(1 / MOST <= found <= MOST for found in shifts) else 1


if __name__ == "__main__":
    sys.exit(main())
