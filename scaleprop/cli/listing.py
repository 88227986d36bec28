"""``scaleprop formats``, ``recipes``, ``rules`` and ``passes``: the registries, as data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaleprop.formats import ScaledFormat, named_formats, parse
from scaleprop.recipes import Recipe, named_recipe, named_recipes

if TYPE_CHECKING:
    from scaleprop.cli.models import Subject

NO_RULE = "no rule"  # in place of the family

_CODE = ("operator", "homogeneity")
_RULES_HEAD = """\
# Rules

What is known of the operators of {of}.
Written by `scaleprop rules --markdown FILE`.

- **homogeneity**: how positive scales of the inputs appear at the output. `x0^1*x1^-1` is
  f(s₀·x₀, s₁·x₁) = s₀·s₁⁻¹·f(x₀, x₁). An argument that is not named must be unscaled; where nothing
  is said, all must be. `1`: nothing has a scale. `follows x2`: x2 must carry the scale of the
  output. `y0: …; y1: …`: outputs that differ. `up to a constant`: but for one that does not scale,
  such as a norm's ε. `depends on constants`: true for some of the operator's constants, such as a
  clamp at zero.
- **axes**: which axes of x0 are axes of the output is known.
- **moves**: the output holds the elements of x0, each at least once, and no others.
- **moments**: mean, RMS and share of zeros of the output follow from those of the inputs: pointwise
  operators are integrated over their inputs' quantiles, others have a formula.
- **bounded**: the size of what comes out does not follow x0's.
- **degree**: of x0, where it is no whole number.
- **contraction**: a sum of products, and of which kind; or what makes the gradients of one.
- **stays high because**: why its operands are not quantized, or not always.

An operator without a rule is left alone, and its tensors stay in float. Those are listed last.
"""


def formats(names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One row per named format, or per format in ``names``.

    ``bytes_per_value`` counts the scales that blocks carry; a scale per tensor, row or channel
    costs its own bytes once per tensor, row or channel and is not counted.
    """
    found = {name: parse(name) for name in names} if names else named_formats()
    return [_format_row(name, fmt) for name, fmt in found.items()]


def _format_row(name: str, fmt: ScaledFormat) -> dict[str, Any]:
    rows, columns = fmt.block or (0, 0)
    bits = fmt.bits + (fmt.scale.bits / (rows * columns) if fmt.block else 0)
    return {
        "name": name,
        "in_full": fmt.long_name,
        "element": fmt.element.name,
        "bits": fmt.bits,
        "max": fmt.element.levels if fmt.zero_point else fmt.element.max,  # type: ignore[union-attr]
        "shares_a_scale": str(fmt.granularity),
        "scale": fmt.scale.name + ("*f32" if fmt.two_level else ""),
        "rule": fmt.rule,
        "bytes_per_value": round(bits / 8, 5),
    }


def recipes(name: str | None = None) -> list[dict[str, Any]]:
    """The recipes that ship, or one by name or file; each as ``Recipe.to_dict`` spells it."""
    found: tuple[Recipe, ...] = (named_recipe(name),) if name else named_recipes()
    return [recipe.to_dict() for recipe in found]


def training_recipes() -> list[dict[str, Any]]:
    """The training recipes that ship, each as ``TrainingRecipe.to_dict`` spells it."""
    from scaleprop.recipes.training_named import NAMED

    return [recipe.to_dict() for recipe in NAMED]


def passes() -> list[dict[str, Any]]:
    """One row per pass, in the order in which they usually run: what it does, its options."""
    from scaleprop.passes.pipeline import describe_passes

    return [dataclasses.asdict(info) for info in describe_passes()]


def rules(subject: Subject | None = None) -> list[dict[str, Any]]:
    """One row per operator, those without a rule last, as ``Coverage`` has it.

    Of ``subject``'s captured graph, where one is given; else of the registry and core ATen.
    """
    from scaleprop.rules import core_operators, coverage

    if subject is None:
        lines = coverage(also=core_operators())
    else:
        lines = [line for line in coverage(_operators(subject)) if line.count]
    return [dataclasses.asdict(line) for line in lines]


def _operators(subject: Subject) -> list[Any]:
    """What the captured graph calls; Python's own functions of sizes and tuples do not count."""
    from scaleprop._torch_compat import OperatorBase
    from scaleprop.passes.capture import capture
    from scaleprop.signature import split_example

    program = capture(subject.model, *split_example(subject.inputs))
    return [node.target for node in program.module.graph.nodes
            if isinstance(node.target, OperatorBase)]


def rule_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of ``rules``; a column that would be empty is left out."""
    table = [
        {
            "operator": row["op"],
            "family": NO_RULE if row["family"] is None else row["family"],
            "calls": str(row["count"] or ""),
            "homogeneity": row["homogeneity"],
            "axes": "yes" if row["axes"] else "",
            "moves": "yes" if row["moves"] else "",
            "moments": "yes" if row["moments"] else "",
            "bounded": "yes" if row["bounded"] else "",
            "degree": "" if row["degree"] is None else f"{row['degree']:g}",
            "contraction": row["contraction"] or "",
            "stays high because": row["high"],
        }
        for row in rows
    ]
    columns = [name for name in (table[0] if table else ()) if any(row[name] for row in table)]
    return columns, [[row[name] for name in columns] for row in table]


def rules_markdown(rows: Sequence[dict[str, Any]], model: str | None = None) -> str:
    """``docs/rules.md``: what the columns mean, and a table per family."""
    import torch

    from scaleprop.cli.output import markdown_table

    version = torch.__version__.partition("+")[0]
    of = f"`{model}`" if model else f"the registry and of core ATen (torch {version})"
    sections = [_RULES_HEAD.format(of=of)]
    for family, group in itertools.groupby(rows, key=lambda row: row["family"] or NO_RULE):
        columns, table = rule_table([{**row, "family": ""} for row in group])
        sections += [f"## {family}\n", markdown_table(columns, table, _CODE)]
    return "\n".join(sections)


def training_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of ``training_recipes``; a role that none of them has is left out."""
    from scaleprop.recipes.training import OPERANDS

    roles = [role for role in OPERANDS if any(role in row["operands"] for row in rows)]
    return (["name", *roles, "description", "source"],
            [[row["name"], *(operand_text(row["operands"].get(role)) for role in roles),
              row["description"], row["source"]] for row in rows])


def operand_text(operand: dict[str, Any] | None) -> str:
    """Format, and what is not as it is by default."""
    if operand is None:
        return "–"
    more = [operand["rounding"] if operand["rounding"] != "nearest" else "",
            f"rotated {operand['hadamard']}" if operand["hadamard"] else "",
            operand["scaling"] if operand["scaling"] != "current" else "",
            f"×{operand['prescale']:g}" if operand["prescale"] != 1.0 else "",
            "of fprop's" if operand["of"] == "quantized" else "",
            operand["estimator"] if operand["estimator"] != "ste" else ""]
    return ", ".join([operand["format"], *filter(None, more)])


def role_text(role: dict[str, Any] | None) -> str:
    """Format, and what is not as it is by default; ``high`` without one."""
    if role is None:
        return "high"
    extras = [value for key, usual in (("scaling", "dynamic"), ("clipping", "amax"),
                                       ("rounding", "nearest"))
              if (value := role[key]) != usual]
    return " ".join([role["format"], *extras])
