"""``scaleprop formats``, ``recipes`` and ``passes``: the registries, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from scaleprop.formats import ScaledFormat, named_formats, parse
from scaleprop.recipes import Recipe, named_recipe, named_recipes


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


def passes() -> list[dict[str, Any]]:
    """One row per pass, in the order in which they usually run: what it does, its options."""
    from scaleprop.passes.pipeline import describe_passes

    return [dataclasses.asdict(info) for info in describe_passes()]
