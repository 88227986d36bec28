"""Which recipes the solver of exponents runs: on data of a dtype of their own, no scale found at
run time."""

from __future__ import annotations

from scaleprop.formats import parse
from scaleprop.formats.scaled import PLAIN
from scaleprop.passes.training.lower import Formats
from scaleprop.recipes.training import Operand, TrainingRecipe

_KINDS = {"x": ("fprop.x", "wgrad.x"), "w": ("fprop.w", "dgrad.w"), "dy": ("dgrad.dy", "wgrad.dy")}


def solved(recipe: TrainingRecipe) -> Formats | None:
    """``recipe`` as what ``lower_products`` takes: one element a kind of value, rounded to nearest,
    at exponents that are chosen for the whole graph (``static``, powers of two), or all 0
    (``constant:0``), or in bfloat16 as they are. None for every other recipe."""
    operands = recipe.operands
    roles = {role for kinds in _KINDS.values() for role in kinds}
    if recipe.phases or recipe.convolutions or recipe.every or set(operands) != roles \
            or not set(recipe.high) <= {"head"}:
        return None
    ways = {_way(operand) for operand in operands.values()}
    elements = {kind: {_element(operands[role]) for role in roles}
                for kind, roles in _KINDS.items()}
    if None in ways or len(ways) > 1 or any(len(found) > 1 for found in elements.values()):
        return None
    x, w, dy = (elements[kind].pop() or "" for kind in _KINDS)
    return Formats(x=x, w=w, dy=dy, scaled=ways == {"static"}, head="head" not in recipe.high)


def _way(operand: Operand) -> str | None:
    """``static``, ``as it is``, or None for what the solver does not do."""
    format = operand.format
    if operand != Operand(format=format, scaling=operand.scaling):
        return None
    if format in PLAIN:
        return "as it is" if format == "bf16" else None
    found = parse(format)
    if found.granularity.kind != "tensor" or found.element.name not in ("e4m3", "e5m2"):
        return None
    if operand.scaling == "static" and found.rule == "pow2":
        return "static"
    return "as it is" if operand.scaling == "constant:0" else None


def _element(operand: Operand) -> str:
    return operand.format if operand.format in PLAIN else parse(operand.format).element.name
