"""Quantizes attention's two batched products and their four gradients.

    scores = q·kᵀ      result = p·v      dp = dy·vᵀ    dv = pᵀ·dy    dq = ds·k    dk = dsᵀ·q

Fused attention is spelled in products before gradients are taken, see ``in_products``: only then is
there something to quantize. Rows of all members of a batch are the rows of one matrix.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Mapping
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
    masked = attn_mask is not None
    if is_causal:
        rows, columns = scores.shape[-2:]
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # a query that may attend to nothing gets zeros, as from the fused operator
    weights = aten._safe_softmax.default(scores, -1) if masked else scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def _with_attention_in_products(function: Any) -> Any:
    """A copy of a function of ``torch.nn.functional`` that finds ``in_products`` where the fused
    attention is."""
    found = {**vars(F), "scaled_dot_product_attention": in_products}
    made = types.FunctionType(function.__code__, found, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    found[function.__name__] = made  # which it calls again, where a mode looks on
    return made


_SPELLED: Mapping[Any, Any] = {
    F.scaled_dot_product_attention: in_products,
    # Dynamo leaves it whole
    F.multi_head_attention_forward: _with_attention_in_products(F.multi_head_attention_forward)}


def spell_attention(module: torch.fx.GraphModule) -> None:
    """Replace, in place, fused attention of a Dynamo graph by ``in_products``."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.target = _SPELLED.get(node.target, node.target)
    module.recompile()


def quantize_attention(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node], work: Rewrite,
    kept: Collection[torch.fx.Node] = (),
) -> list[torch.fx.Node]:
    """Quantize, in place, the factors of batched products of activations and of their gradients,
    but for those that are ``kept`` high; the products."""
    if not any(role in work.settings.operands for role in ROLES):
        return []
    sums = _take_sums_apart(graph, parameters, work, kept)
    gradients = gradient_values(graph)
    multiplied: set[torch.fx.Node] = set()  # what forward products read
    found: list[tuple[torch.fx.Node, list[str]]] = []
    for node in graph.find_nodes(op="call_function", target=_BMM):
        sources = {source_of(factor)[0] for factor in node.args if factor not in gradients}
        if not is_float(node.meta["val"]) or not sources:
            continue
        kinds = ["dy" if factor in gradients else "x" for factor in node.args]
        if "dy" in kinds:
            if sources <= multiplied:
                found.append((node, kinds))
        elif not any(parameter_of(source) in parameters for source in sources):
            multiplied |= sources
            found.append((node, kinds))
    found = [each for each in found if each[0] not in kept]
    # of the graph: others of the model have attention too
    first = next((work.settings.names[node] for node in graph.find_nodes(op="placeholder")
                  if node in parameters and node in work.settings.names), "")
    for place, (node, kinds) in enumerate(found):
        left, right = (_read(work, node, number, f"attention{place} of {first}", kind)
                       for number, kind in enumerate(kinds))
        result = work.call(_BMM, (left.node, right.node), node)
        result = work.restored(result, (left, right), node.meta["val"].dtype, node)
        node.replace_all_uses_with(result)
    return [*sums, *(node for node, _ in found)]


def _take_sums_apart(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node], work: Rewrite,
    kept: Collection[torch.fx.Node],
) -> list[torch.fx.Node]:
    """beta·c + alpha·a·b as a product and a sum, c being a mask; what these take the place of."""
    found = [node for node in graph.find_nodes(op="call_function", target=aten.baddbmm.default)
             if node not in kept and not any(parameter_of(source_of(factor)[0]) in parameters
                                             for factor in node.args[1:3])]
    for node in found:
        parts = [work.call(_BMM, node.args[1:3], node), node.args[0]]
        for place, name in enumerate(("alpha", "beta")):
            if node.kwargs.get(name, 1) != 1:
                parts[place] = work.call(aten.mul.Tensor, (parts[place], node.kwargs[name]), node)
        node.replace_all_uses_with(work.call(aten.add.Tensor, tuple(parts), node))
        graph.erase_node(node)
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
