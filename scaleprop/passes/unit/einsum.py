"""Einstein sums of two factors as the matrix products that they are.

PyTorch computes them so too; spelled out, a weight's place and what is summed over are known.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import torch.fx

from scaleprop.passes.dimensions import is_symbolic
from scaleprop.passes.unit.writer import Writer

aten: Any = torch.ops.aten

_EINSUM: Any = aten.einsum.default

Axes = tuple[str, ...]  # what an axis is called: a letter, or one of an ellipsis' places


@dataclasses.dataclass(frozen=True)
class _Sum:
    """left[batch, rows, summed] · right[batch, summed, columns] → result, in any order each."""

    left: Axes
    right: Axes
    result: Axes

    def common(self, in_result: bool) -> Axes:
        return tuple(a for a in self.left if a in self.right and (a in self.result) == in_result)

    @property
    def rows(self) -> Axes:
        return tuple(axis for axis in self.left if axis not in self.right)

    @property
    def columns(self) -> Axes:
        return tuple(axis for axis in self.right if axis not in self.left)


def spell_einsums(graph: torch.fx.Graph) -> int:
    """Spell out sums of two factors, in place; how many. Others stay: diagonals, sums over one
    factor's own axes, factors that broadcast, and products without a sum."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=_EINSUM):
        if (found := _parse(node)) is not None:
            _spell(graph, node, found)
            count += 1
    return count


def _parse(node: torch.fx.Node) -> _Sum | None:
    equation, operands = node.args[:2]
    if len(operands) != 2:  # type: ignore[arg-type]
        return None
    given, arrow, result = str(equation).replace(" ", "").partition("->")
    terms = given.split(",")
    values = [operand.meta["val"] for operand in operands]  # type: ignore[union-attr]
    left, right = (_axes(term, value.dim()) for term, value in zip(terms, values, strict=True))
    both = (*left, *right)
    if arrow:
        out = _axes(result, node.meta["val"].dim())
    else:  # what the factors do not share, by name, an ellipsis first
        ellipsis = {axis for axis in both if not axis.isalpha()}
        out = (*sorted(ellipsis, key=_place, reverse=True), *sorted(axis for axis in both
                                          if axis.isalpha() and both.count(axis) == 1))
    found = _Sum(left, right, out)
    sizes = [dict(zip(axes, value.shape, strict=True))
             for axes, value in zip((left, right), values, strict=True)]
    plain = all(len(set(axes)) == len(axes) for axes in (left, right))
    summed_alone = set(found.rows + found.columns) - set(out)
    broadcast = any(_differ(sizes[0][axis], sizes[1][axis]) for axis in left if axis in right)
    return found if plain and not summed_alone and not broadcast and found.common(False) else None


def _axes(term: str, count: int) -> Axes:
    """``b...k`` of four axes is b, .2, .1, k: an ellipsis' places count from its end."""
    names = re.findall(r"\.\.\.|[A-Za-z]", term)
    extra = count - sum(name != "..." for name in names)
    return tuple(axis for name in names for axis in (
        [f".{place}" for place in range(extra, 0, -1)] if name == "..." else [name]))


def _place(axis: str) -> int:
    return int(axis[1:])


def _differ(one: Any, other: Any) -> bool:
    """Whether sizes are other numbers, or only one of them may vary."""
    return is_symbolic(one) != is_symbolic(other) or (not is_symbolic(one) and one != other)


def _spell(graph: torch.fx.Graph, node: torch.fx.Node, found: _Sum) -> None:
    write = Writer(graph, node)
    operands: Any = node.args[1]
    left, right = operands
    batch, summed = found.common(True), found.common(False)
    rows, columns = found.rows, found.columns
    one = _flattened(write, left, found.left, (batch, rows, summed))
    two = _flattened(write, right, found.right, (batch, summed, columns))
    made = write(aten.matmul.default, one, two)
    sizes = {axis: (operand, place) for operand, axes in ((left, found.left), (right, found.right))
             for place, axis in enumerate(axes)}
    for group, place in ((columns, len(batch) + 1), (rows, len(batch))):
        if not group:
            made = write(aten.squeeze.dim, made, place)
        elif len(group) > 1:
            made = _split(write, made, place, [write.size(*sizes[axis]) for axis in group])
    order = (*batch, *rows, *columns)
    made = _permuted(write, made, [order.index(axis) for axis in found.result])
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _flattened(
    write: Writer, x: torch.fx.Node, axes: Axes, groups: tuple[Axes, Axes, Axes]
) -> torch.fx.Node:
    """x as [*groups[0], groups[1], groups[2]], the last two one axis each."""
    made = _permuted(write, x, [axes.index(axis) for group in groups for axis in group])
    for place in (2, 1):
        start = sum(map(len, groups[:place]))
        if not groups[place]:
            made = write(aten.unsqueeze.default, made, start)
        elif len(groups[place]) > 1:
            made = _merged(write, made, start, start + len(groups[place]))
    return made


def _merged(write: Writer, x: torch.fx.Node, start: int, end: int) -> torch.fx.Node:
    sizes = [write.size(x, axis) for axis in range(x.meta["val"].dim())]
    return write(aten.reshape.default, x, [*sizes[:start], -1, *sizes[end:]])


def _split(write: Writer, x: torch.fx.Node, place: int, into: list[Any]) -> torch.fx.Node:
    sizes = [write.size(x, axis) for axis in range(x.meta["val"].dim())]
    return write(aten.reshape.default, x, [*sizes[:place], *into, *sizes[place + 1:]])


def _permuted(write: Writer, x: torch.fx.Node, order: list[int]) -> torch.fx.Node:
    return x if order == sorted(order) else write(aten.permute.default, x, order)
