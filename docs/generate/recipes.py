"""The pages on recipes: roles, formats, sources, what each costs and when to use it."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks import harness, post_training
from benchmarks.harness import Timing
from docs.generate.formats import bits_with_scale
from docs.generate.markdown import ROOT, code, page, table
from docs.generate.peers import load
from scaleprop.cli.listing import operand_text, role_text
from scaleprop.formats import parse
from scaleprop.formats.scaled import PLAIN
from scaleprop.recipes import Recipe, Role, named_recipes
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.recipes.training_named import NAMED

_INFERENCE = """\
What `scaleprop.compile(model, inputs, recipe=…)` takes. A role that a recipe does not name stays in
high precision. Any other combination is one `Recipe` away: see
[the API](../api/recipes.md#scaleprop.Recipe).

| role | what |
| --- | --- |
| `fprop.w`, `fprop.x` | weight and input of linear layers |
| `conv.w`, `conv.x` | weight and input of convolutions |
| `embedding` | tables that are looked up |
"""
_MEASURED = """\
*Bits*: of a value in `fprop.w` and `fprop.x`, with the scale of its block. *Size*, *speed* and
*cosine*: the sentence encoder of the README, from `make demo`: the file and the speed with 8×128
tokens in multiples of ONNX Runtime's in float32, and the mean cosine of its embeddings to
float32's. *With a method*: the greatest cosine that the methods of [post-training
quantization](../results/post_training.md) reach in the same formats, and which one does.
"""
_TRAINING = """\
What `scaleprop.prepare_training(model, recipe)` takes: see [training](../training.md) and [how
operands are described](../training-recipes.md). `eXmY`, as in `e5m7`, truncates every value of the
step to that format.
"""
_TRAINED = """\
*Bits*: of a value in `fprop.x`, `fprop.w` and `dgrad.dy`, with the scale of its block. *Loss*: of a
small language model after 240 steps against `bf16`'s, mean and standard error of three seeds; its
differences are mostly noise. *Step*: forward and backward against `bf16`'s, emulated on a CPU: it
says nothing about devices that have the formats. Both from
[these runs](../results/training_recipes.md).
"""


def pages() -> Iterator[tuple[str, str]]:
    """Paths and texts."""
    yield "recipes/inference.md", page(
        "Recipes", _INFERENCE, "## At a glance", _glance(), _MEASURED,
        *(part for recipe in named_recipes() for part in _inference(recipe)))
    yield "recipes/training.md", page(
        "Recipes for training", _TRAINING, "## At a glance", _trained(), _TRAINED,
        *(part for recipe in NAMED for part in _training(recipe)))


def _described(recipe: Recipe | TrainingRecipe) -> list[str]:
    facts = [f"**When**: {recipe.when}." if recipe.when else "",
             f"**Source**: {recipe.source}." if recipe.source else ""]
    return [f"## {recipe.name}", f"{recipe.description[0].upper()}{recipe.description[1:]}.",
            *facts]


def _inference(recipe: Recipe) -> list[str]:
    rows = [(code(role), _cell(role_text(operand)))
            for role, operand in recipe.to_dict()["roles"].items()]
    needs = "Needs `calibration=`." if recipe.needs_calibration else ""
    return [*_described(recipe), needs, table(("role", "format"), rows)]


def _glance() -> str:
    demo, best = demo_rows(), _best_methods()
    header = ("recipe", "bits", "calibrated", "size", "speed", "cosine", "with a method")
    rows: list[tuple[str, ...]] = []
    for recipe in named_recipes():
        row = demo.get(recipe.name, {})
        rows.append((f"[`{recipe.name}`](#{recipe.name})",
                     _bits(recipe.roles.get(role) for role in ("fprop.w", "fprop.x")),
                     "yes" if recipe.needs_calibration else "",
                     row.get("size", ""), row.get("speed 8×128", ""), row.get("cosine", ""),
                     best.get(recipe.name, "")))
    return table(header, rows, header[3:6])


def demo_rows() -> dict[str, dict[str, str]]:
    """The README's table of the demo: recipe → column → cell."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- demo-table -->\n(.*?)\n\n", readme, re.S)
    if found is None:
        raise ValueError("the README has no table of the demo: run `make demo readme`")
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in found[1].splitlines()]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


@functools.cache
def _best_methods() -> Mapping[str, str]:
    """Recipe → the best cosine among our methods in its formats, and the method."""
    cells = load("post_training")
    best: dict[str, str] = {}
    for fmt, recipe in post_training.FORMATS.items():
        found = {method: cells[f"minilm|{fmt}|{method}"]["value"]
                 for method in post_training.METHODS
                 if "value" in cells.get(f"minilm|{fmt}|{method}", {})}
        if found:
            method = max(found, key=found.__getitem__)
            best[recipe] = f"{found[method]:.4f} ({method})"
    return best


def _bits(roles: Iterable[Role | Operand | None]) -> str:
    names = ["f32" if each is None else each.format for each in roles]
    return " × ".join(name if name in PLAIN else f"{bits_with_scale(parse(name)):g}"
                      for name in names).replace("f32", "float")


def _cell(text: str) -> str:
    """What a role or an operand says, its format as code."""
    found = re.match(r"[^ ,]+", text)
    assert found
    return code(found[0]) + text[found.end():]


def _training(recipe: TrainingRecipe) -> list[str]:
    rows = [(code(role), _cell(operand_text(operand)))
            for role, operand in recipe.to_dict()["operands"].items()]
    high = f"Stays high: {', '.join(map(code, recipe.high))}." if recipe.high and rows else ""
    return [*_described(recipe), high, table(("role", "operand"), rows) if rows else ""]


def _trained() -> str:
    results = load("training_recipes")["sections"]
    header = ("recipe", "bits", "loss, %", "step")
    rows: list[tuple[str, ...]] = []
    for recipe in NAMED:
        bits = _bits(recipe.operands.get(role) for role in ("fprop.x", "fprop.w", "dgrad.dy"))
        row = results.get(recipe.name)
        rows.append((f"[`{recipe.name}`](#{recipe.name})", bits,
                     _gap(row, results["bf16"]) if row and recipe.name not in _UNLIKE else "",
                     _step(row, recipe.name) if row else ""))
    return table(header, rows, header[2:])


_UNLIKE = ("bf16", "mus-fp8")  # the baseline; and what is trained from another one


def _gap(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    gaps = [100 * (ours / theirs - 1)
            for ours, theirs in zip(row["losses"], baseline["losses"], strict=True)]
    error = statistics.stdev(gaps) / len(gaps)**0.5
    return f"{statistics.mean(gaps):+.2f} ± {error:.2f}".replace("-", "−")


def _step(row: Mapping[str, Any], name: str) -> str:
    timings = {key: Timing.from_dict(each) for key, each in row["timings"].items()}
    if name == "bf16" or not {name, "bf16"} <= set(timings):
        return ""
    return f"{harness.speedup(timings['bf16'], timings[name], 'wall').median:.2f}"
