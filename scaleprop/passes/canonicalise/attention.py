"""Attention: label the two products around a softmax, so that the report can name them.

    softmax(q·kᵀ·s + mask)·v    the first product is "queries × keys", the second "weights × values"

Nothing is rewritten: both products stay as they are, in high precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.fx

from scaleprop.passes.canonicalise.match import aten, is_call, refuse
from scaleprop.passes.rewrite import Rewriter
from scaleprop.rules import rule_for

ATTENTION = "scaleprop.attention"  # the key in node.meta

_SOFTMAX = (
    aten.softmax.int,
    getattr(aten, "_softmax").default,  # noqa: B009
    getattr(aten, "_safe_softmax").default,  # noqa: B009
)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
# what may stand between a product and the softmax: scaling, masks, casts, views
_BETWEEN = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.where.self,
    aten.tanh.default,
    aten.maximum.default,
    aten.cat.default,
    getattr(aten, "_to_copy").default,  # noqa: B009
)


def label(rewriter: Rewriter) -> int:
    """Label in place; returns how many attentions were found."""
    return sum(_label(node) for node in rewriter.graph.nodes)


def _label(node: torch.fx.Node) -> bool:
    products = products_around(node)
    if products is None:
        return False
    scores, values = products
    scores.meta[ATTENTION] = "queries × keys"
    values.meta[ATTENTION] = "weights × values"
    return True


def products_around(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Of a softmax between two products: queries × keys, and weights × values; else None."""
    if not is_call(node, *_SOFTMAX):
        return None
    scores = _first_product(node, lambda n: n.all_input_nodes)
    values = _first_product(node, lambda n: list(n.users))
    if scores is None or values is None:
        refuse(node, "no product on both sides of the softmax: not an attention")
        return None
    return scores, values


def _first_product(softmax: torch.fx.Node, step: Any) -> torch.fx.Node | None:
    """The nearest product of activations in one direction."""
    for node in _walk(softmax, step):
        if is_call(node, *_PRODUCTS):
            return node
    return None


def _walk(start: torch.fx.Node, step: Any, limit: int = 24) -> Iterator[torch.fx.Node]:
    """Nodes reached through scaling, masking and views, nearest first."""
    pending, seen = list(step(start)), set[torch.fx.Node]()
    while pending and len(seen) < limit:
        node = pending.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        yield node
        rule = rule_for(node.target)
        moves = rule is not None and rule.family == "movement"
        if moves or is_call(node, *_BETWEEN):
            pending.extend(step(node))
