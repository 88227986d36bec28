"""Which values of a graph mask a softmax: their −∞ is there to hide something, and is no overflow.

From each softmax, and each mask of an attention operator, back: through moves, casts, sums and
selections, and through whatever makes a mask that depends on nothing learned.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.fx

from scaleprop.rules import contraction_of, rule_for
from scaleprop.rules.moments import limit

_MASKS = ("attn_mask", "attn_bias")  # as schemas name what attention adds to its scores
# families of operators that compute each element from one element of each argument, or move it
_BY_ELEMENT = ("elementwise", "movement", "cast")


def mask_chains(
    graph: torch.fx.Graph, learned: Collection[torch.fx.Node]
) -> frozenset[torch.fx.Node]:
    """The values whose elements reach a softmax as they are, but for what is added to them.

    learned: what depends on parameters or gradients; what does not and leads to a softmax is all
    there to mask, whatever it is made by.
    """
    found: set[torch.fx.Node] = set()
    ahead = [value for node in graph.nodes for value in _scores(node)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += carried(node) if node in learned else node.all_input_nodes
    return frozenset(found)


def carried(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The arguments whose elements the output holds, moved, or as terms of sums; a softmax holds
    those of its argument, in that where one is −∞ the logarithm of what comes out is."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    if rule is None:
        return node.all_input_nodes if node.target is operator.getitem else []
    floats = [source for source in node.all_input_nodes if _is_float(source)]
    if rule.family in (*_BY_ELEMENT, "softmax") and len(floats) == 1:
        return floats
    law = rule.law(node)
    if rule.family not in _BY_ELEMENT or law is None or law.degrees:
        return []
    kept = [node.args[place] for place in law.follows if place < len(node.args)]
    return [source for source in _flat(kept) if _is_float(source)]


def fills(node: torch.fx.Node) -> bool:
    """Whether ``node`` puts a number that stands for −∞ where a mask, or places, say:
    ``masked_fill(x, mask, −inf)``."""
    value: Any = node.meta.get("val")
    chosen = any(not _is_float(source) for source in node.all_input_nodes)
    return chosen and isinstance(value, torch.Tensor) and any(
        isinstance(arg, int | float) and arg <= -limit(value.dtype)
        for arg in (*node.args, *node.kwargs.values()))


def _scores(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What ``node`` takes a softmax of, or masks one with."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    if rule is not None and rule.family == "softmax":
        return [node.args[0]]  # type: ignore[list-item]
    contraction = contraction_of(node)
    if contraction is None or contraction.kind != "attention":
        return []
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    masks: list[Any] = [given.get(name) for name in _MASKS]
    return [mask for mask in masks if isinstance(mask, torch.fx.Node)]


def _flat(arguments: Iterable[Any]) -> Iterable[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from argument
        else:
            yield argument


def _is_float(source: Any) -> bool:
    value = source.meta.get("val") if isinstance(source, torch.fx.Node) else None
    first = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()
