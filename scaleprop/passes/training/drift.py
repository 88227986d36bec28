"""How far each value's size may move while a model trains, in powers of two.

A prediction from the graph alone. Parameters, inputs and the loss's gradient move by themselves,
each independently; a value's size is a product of powers of theirs, which the operators' rules say:
x·rsqrt(mean(x²)) has power zero of x. Operators that bound their output forget what came before. A
static exponent must leave as much room as its value may drift.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.passes.exponents.facts import is_float
from scaleprop.passes.training.roles import is_tangent
from scaleprop.rules import Homogeneity, rule_for

_SUMS: Any = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)

# log2 of how much they may grow or shrink
PARAMETER = 2.0
INPUT = 1.0
GRADIENT = 4.0  # what comes in from a loss: errors shrink as the model learns

# source → its power in a value's size, times the source's own drift
_Powers = Mapping[torch.fx.Node, float]


def drifts(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node],
    sizes: Mapping[torch.fx.Node, float] | None = None,
) -> Mapping[torch.fx.Node, float]:
    """log2 of how much larger or smaller each value of a joint graph may become.

    sizes: of ``addends``, as far as they were measured.
    """
    powers: dict[torch.fx.Node, _Powers] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            own = PARAMETER if node in parameters else GRADIENT if is_tangent(node) else INPUT
            powers[node] = {node: own}
        elif node.op == "call_function":
            powers[node] = _powers(node, powers, sizes or {})
    return {node: _size(found) for node, found in powers.items()}


def addends(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The terms of all sums."""
    return {term for node in graph.nodes for term in _terms(node)}


def _terms(node: torch.fx.Node) -> list[torch.fx.Node]:
    if node.target not in _SUMS:
        return []
    terms = [given for given in node.args[:2] if isinstance(given, torch.fx.Node)]
    return terms if all(is_float(term.meta.get("val")) for term in terms) else []


def _size(powers: _Powers) -> float:
    """Independent drifts add as variances do."""
    return math.sqrt(sum(power * power for power in powers.values()))


def _powers(
    node: torch.fx.Node, known: Mapping[torch.fx.Node, _Powers],
    sizes: Mapping[torch.fx.Node, float],
) -> _Powers:
    terms = _terms(node)
    known_sizes = [sizes.get(term, math.nan) for term in terms]
    largest_size = max(known_sizes, default=0.0)
    if len(terms) == 2 and largest_size > 0.0 and all(map(math.isfinite, known_sizes)):
        squares = [(size / largest_size) ** 2 for size in known_sizes]  # sizes' own may overflow
        return _weighted([(square / sum(squares), known.get(term, {}))
                          for term, square in zip(terms, squares, strict=True)])
    rule = rule_for(node.target)
    law = rule.law(node) if rule is not None else None
    if law is not None and law.scaled:
        return _of_product(node, law, known)
    sources = node.all_input_nodes
    if rule is not None and rule.bounded:
        sources = [source for source in sources if source is not node.args[0]]
    largest = _largest([known.get(source, {}) for source in sources])
    factor = rule.degree if rule is not None and rule.degree is not None else 1.0
    return {source: factor * power for source, power in largest.items()}


def _of_product(
    node: torch.fx.Node, law: Homogeneity, known: Mapping[torch.fx.Node, _Powers]
) -> _Powers:
    """Of several outputs: the one that may move most."""

    def of(degrees: Mapping[int, int]) -> _Powers:
        total: dict[torch.fx.Node, float] = {}
        for place, degree in degrees.items():
            given = node.args[place] if place < len(node.args) else None
            factor = known.get(given, {}) if isinstance(given, torch.fx.Node) else {}
            for source, power in factor.items():
                total[source] = total.get(source, 0.0) + degree * power
        return total

    return _largest([of(degrees) for degrees in law.outputs or (law.degrees,)])


def _weighted(parts: Sequence[tuple[float, _Powers]]) -> _Powers:
    total: dict[torch.fx.Node, float] = {}
    for share, powers in parts:
        for source, power in powers.items():
            total[source] = total.get(source, 0.0) + share * power
    return total


def _largest(found: Sequence[_Powers]) -> _Powers:
    return max(found, key=_size, default={})
