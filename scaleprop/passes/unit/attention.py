"""Attention as the products it is made of, where it would be composed of them anyway.

With dropout PyTorch has no fused attention on the CPU: it multiplies probabilities of RMS near
1/length with the values. Spelled out, they can be held at unit RMS as every factor is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx

from scaleprop.passes.unit.writer import Writer

aten: Any = torch.ops.aten

_ATTENTION: Any = aten.scaled_dot_product_attention.default
_DEFAULTS = (None, 0.0, False)  # of attn_mask, dropout_p, is_causal


def spell_attention(graph: torch.fx.Graph) -> int:
    """Spell out attention with dropout on the CPU, in place; how many."""
    found = [node for node in graph.find_nodes(op="call_function", target=_ATTENTION)
             if len(node.args) > 4 and node.args[4] and node.meta["val"].device.type == "cpu"]
    for node in found:
        _spell(graph, node)
    return len(found)


def _spell(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """softmax(q·kᵀ·scale + mask)·v, dropout on the probabilities."""
    write = Writer(graph, node)
    query, key, value, *rest = node.args
    mask, p, causal = (*rest, *_DEFAULTS[len(rest):])
    q, k = query.meta["val"], key.meta["val"]  # type: ignore[union-attr]
    if node.kwargs.get("enable_gqa", False) and k.shape[-3] != q.shape[-3]:
        groups = q.shape[-3] // k.shape[-3]
        key, value = (write(aten.repeat_interleave.self_int, each, groups, -3)
                      for each in (key, value))
    scale: Any = node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    transposed = write(aten.transpose.int, key, -2, -1)
    # the products' factors as they are: a query times 1/√d would be small
    scores = write(aten.mul.Tensor, write(aten.matmul.default, query, transposed), scale)
    if causal:
        scores = write(aten.masked_fill.Scalar, scores, _future(write, query, key, q), -math.inf)
    if mask is not None:
        if mask.meta["val"].dtype is torch.bool:  # type: ignore[union-attr]
            hidden = write(aten.logical_not.default, mask)
            scores = write(aten.masked_fill.Scalar, scores, hidden, -math.inf)
        else:
            scores = write(aten.add.Tensor, scores, mask)
    # rows that are masked throughout give zeros, as in the fused operator
    weights = write(aten._safe_softmax.default, scores, -1)
    dropped = write(aten.dropout.default, weights, p, True)
    result = write(aten.matmul.default, dropped, value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _future(write: Writer, query: Any, key: Any, like: torch.Tensor) -> torch.fx.Node:
    """True where a key lies after the query."""
    sizes = [write.size(each, -2) for each in (query, key)]
    ones = write(aten.ones.default, sizes, dtype=torch.bool, device=like.device)
    return write(aten.triu.default, ones, 1)
