"""How far each value's size may move while a model trains, in powers of two.

A prediction from the graph alone. Parameters, inputs and the loss's gradient move by themselves,
each independently; a value's size is a product of powers of theirs, which the operators' rules say:
x·rsqrt(mean(x²)) has power zero of x. Operators that bound their output forget what came before. A
static exponent must leave as much room as its value may drift.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.fx

from scaleprop.rules import Homogeneity, rule_for

# log2 of how much they may grow or shrink
PARAMETER = 2.0
INPUT = 1.0
GRADIENT = 4.0  # what comes in from a loss: errors shrink as the model learns

# source → its power in a value's size, times the source's own drift
_Powers = Mapping[torch.fx.Node, float]


def drifts(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node]
) -> Mapping[torch.fx.Node, float]:
    """log2 of how much larger or smaller each value of a joint graph may become."""
    powers: dict[torch.fx.Node, _Powers] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            gradient = str(node.target).startswith("tangents")
            own = PARAMETER if node in parameters else GRADIENT if gradient else INPUT
            powers[node] = {node: own}
        elif node.op == "call_function":
            powers[node] = _powers(node, powers)
    return {node: _size(found) for node, found in powers.items()}


def _size(powers: _Powers) -> float:
    """Independent drifts add as variances do."""
    return math.sqrt(sum(power * power for power in powers.values()))


def _powers(node: torch.fx.Node, known: Mapping[torch.fx.Node, _Powers]) -> _Powers:
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


def _largest(found: Sequence[_Powers]) -> _Powers:
    return max(found, key=_size, default={})
