"""A small Llama trained on the standard library's source, by recipe: losses, table and curves.

    python -m examples.train_lm [--seeds 3] [--recipes fp32,fp8,unit-fp32,unit-fp8]
                                [--plot docs/training.svg] [--json runs.json]
    python -m examples.train_lm --short         # three steps of a tiny one

Model, text and loop are in ``examples/language_model.py``: the recipes of a seed start from the
same weights and see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from examples import language_model
from examples.language_model import RECIPES, Recipe, Run, Settings

SHORT = Settings(vocabulary=300, width=32, layers=1, context=16, batch=2, steps=3, rate=1e-3)


def runs(
    name: str, seeds: int, text: torch.Tensor, settings: Settings, recipe: Recipe | None = None
) -> Iterator[Run]:
    """Train ``seeds`` models by one recipe, by default the one of this name."""
    recipe = recipe or RECIPES[name]
    seen, held_out = language_model.split(text)
    model, starts = language_model.prepared(recipe, seeds, seen, settings)
    for seed, start in enumerate(starts):
        model.load_state_dict(start)
        yield language_model.train(model, recipe, (name, seed), seen, held_out, settings)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipes", default="fp32,fp8,unit-fp32,unit-fp8",
                        help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--plot", type=Path, help="write a picture of the curves")
    parser.add_argument("--json", type=Path, help="write every loss")
    parser.add_argument("--short", action="store_true", help=f"unless said otherwise, {SHORT}")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default))
    options = parser.parse_args(arguments)
    names = options.recipes.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"unknown recipes {unknown}; known: {', '.join(RECIPES)}")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    settings = dataclasses.replace(
        SHORT if options.short else Settings(),
        **{name: value for name, value in given.items() if value is not None})
    text = language_model.tokens(settings.vocabulary)
    size = sum(parameter.numel() for parameter in language_model.Language(settings).parameters())
    print(f"{len(text)} tokens; {size} parameters", flush=True)
    found = [run for name in names for run in runs(name, options.seeds, text, settings)]
    print(language_model.table(found))
    if options.plot:
        language_model.plot(found, options.plot)
    if options.json:
        language_model.save(found, settings, options.json)
    return found


if __name__ == "__main__":
    main()
