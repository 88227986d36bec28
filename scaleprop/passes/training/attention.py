"""Quantizes attention's two batched products and their four gradients.

    scores = q·kᵀ      result = p·v      dp = dy·vᵀ    dv = pᵀ·dy    dq = ds·k    dk = dsᵀ·q

Fused attention is spelled in products before gradients are taken, see ``in_products``: only then is
there something to quantize. Rows of all members of a batch are the rows of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.fx
from torch.nn import functional as F

from scaleprop.passes.exponents.facts import is_float
from scaleprop.passes.training.matrices import Matrix
from scaleprop.passes.training.rewrite import Data, Rewrite
from scaleprop.passes.training.roles import gradient_values, parameter_of, source_of

aten: Any = torch.ops.aten
_BMM: Any = aten.bmm.default
ROLES = ("attention.x", "attention.dy")


def in_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` in products and a softmax, with its arguments."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    factor = 1.0 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        rows, columns = scores.shape[-2:]
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # a query that may attend to nothing gets zeros, as from the fused operator
        weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def spell_attention(module: torch.fx.GraphModule) -> None:
    """Replace, in place, fused attention of a Dynamo graph by ``in_products``."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            node.target = in_products
    module.recompile()


def quantize_attention(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node], work: Rewrite
) -> list[torch.fx.Node]:
    """Quantize, in place, the factors of batched products of activations and of their gradients;
    the products."""
    if not any(role in work.settings.operands for role in ROLES):
        return []
    gradients = gradient_values(graph)
    multiplied: set[torch.fx.Node] = set()  # what forward products read
    found: list[torch.fx.Node] = []
    for node in graph.find_nodes(op="call_function", target=_BMM):
        sources = {source_of(factor)[0] for factor in node.args if factor not in gradients}
        if not is_float(node.meta["val"]) or not sources:
            continue
        if len([factor for factor in node.args if factor in gradients]) == 1:
            if sources <= multiplied:
                found.append(node)
        elif not any(parameter_of(source) in parameters for source in sources):
            multiplied |= sources
            found.append(node)
    for place, node in enumerate(found):
        left, right = (_read(work, node, number, f"attention{place}",
                             "dy" if factor in gradients else "x")
                       for number, factor in enumerate(node.args))
        result = work.call(_BMM, (left.node, right.node), node)
        result = work.restored(result, (left, right), node.meta["val"].dtype, node)
        node.replace_all_uses_with(result)
    return found


def _read(work: Rewrite, node: torch.fx.Node, place: int, name: str, kind: str) -> Data:
    """A factor's data, laid out as the product reads it; float32."""
    value: Any = node.args[place]
    role = f"attention.{kind}"
    rows = value if place == 0 else work.call(aten.transpose.int, (value, 1, 2), node)
    last = work.size(rows, 2, node)
    flat = work.call(aten.clone.default, (rows,), node,
                     kwargs={"memory_format": torch.contiguous_format})
    flat = work.call(aten.view.default, (flat, [-1, last]), node)
    # signs are of the product, random bits of the factor
    data = work.operand(f"{name}#{place}", role, Matrix(flat, False, (flat,), 1), node)
    sizes = [work.size(rows, axis, node) for axis in (0, 1)]
    laid = work.call(aten.view.default, (data.node, [*sizes, -1]), node)
    wide = work.call(aten._to_copy.default, (laid,), node, kwargs={"dtype": torch.float32})
    if place == 1:
        wide = work.call(aten.transpose.int, (wide, 1, 2), node)
    return Data(wide, data.outer, data.prescale)
