"""Mean, RMS and sparsity of every value of a graph, from its inputs and the operators' rules.

Nothing is run. An operator without an answer leaves its value unknown, and what reads it too, until
an operator that sets the size of what comes out (a norm).
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx

from scaleprop.rules import rule_for
from scaleprop.rules.moments import Answer, Call, Moments, answer, moments_rule_for
from scaleprop.rules.moments_pointwise import SAME, Value, integrate, is_pointwise


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was predicted of a graph.

    moments: of every value that is known; masks included, other integers never.
    unknown: operators that gave no answer though what they read was known → how often.
    """

    moments: Mapping[torch.fx.Node, Moments]
    unknown: Mapping[str, int]


def predict(graph: torch.fx.Graph, given: Mapping[torch.fx.Node, Moments]) -> Prediction:
    """Moments of the values of ``graph``.

    given: those that are not to be predicted: inputs, and whatever else is known.
    """
    work = _Prediction(given)
    for node in graph.nodes:
        if node in given:
            work.values[node] = Value(given[node])
        elif node.op == "call_function":
            work.visit(node)
    return Prediction({node: value.moments for node, value in work.values.items()}, work.unknown)


class _Prediction:
    def __init__(self, given: Mapping[torch.fx.Node, Moments]) -> None:
        self.given = given
        self.values: dict[torch.fx.Node, Value] = {}
        self._several: dict[torch.fx.Node, tuple[Moments | None, ...]] = {}
        self.unknown: Counter[str] = Counter()

    def visit(self, node: torch.fx.Node) -> None:
        """Set what is known of ``node``."""
        if node.target is operator.getitem:
            source: Any = node.args[0]
            parts = self._several.get(source)
            found = parts[node.args[1]] if parts is not None else None  # type: ignore[index]
            if found is not None:
                self.values[node] = Value(found)
            return
        if not _has_moments(node.meta.get("val")):
            return
        try:
            value = self._same(node) or self._pointwise(node) or self._by_rule(node)
        except OverflowError:  # squares beyond float64: nothing is known of it
            value = None
        if value is not None:
            self.values[node] = value
        elif node not in self._several and self._reads_known(node):
            self.unknown[str(node.target)] += 1

    def _same(self, node: torch.fx.Node) -> Value | None:
        """Element for element what its argument is."""
        source: Any = node.args[0] if node.args else None
        if node.target not in SAME or source not in self.values:
            return None
        value = self.values[source]
        if value.samples is not None or value.root is not None:
            return value
        if source.meta["val"].dtype is torch.bool:  # a number made of a mask: zeros and ones
            return Value(value.moments)
        return dataclasses.replace(value, root=source)

    def _pointwise(self, node: torch.fx.Node) -> Value | None:
        return integrate(node, self.values) if is_pointwise(node.target) else None

    def _by_rule(self, node: torch.fx.Node) -> Value | None:
        if moments_rule_for(node.target) is not None:
            found = answer(Call(node, self._known))
        else:
            rule = rule_for(node.target)
            source: Any = node.args[0] if node.args else None
            found = self._known(source) if rule is not None and rule.moves else None
        if isinstance(found, tuple):
            self._several[node] = found
            return None
        return None if found is None else Value(found)

    def _known(self, node: torch.fx.Node) -> Answer:
        if node in self._several:
            return self._several[node]
        return self.values[node].moments if node in self.values else None

    def _reads_known(self, node: torch.fx.Node) -> bool:
        """Whether every float that ``node`` reads is known: then it is its operator that is not."""
        floats = [source for source in node.all_input_nodes
                  if _is_float(source.meta.get("val"))]
        return all(source in self.values or source in self._several for source in floats)


def _has_moments(value: Any) -> bool:
    """Floats and masks; of several outputs: any float."""
    if isinstance(value, tuple | list):
        return any(_is_float(part) for part in value)
    return _is_float(value) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
