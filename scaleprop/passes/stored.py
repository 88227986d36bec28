"""What a model computes in low precision by itself: it calls scaleprop's operators on stored codes.

Such operands are left as they are, whatever the recipe says; the report lists them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.errors import source_line
from scaleprop.formats import parse
from scaleprop.formats.scaled import PLAIN
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.rewrite import Rewriter, shape_of
from scaleprop.report.records import Role, TensorRecord

BY = "model"
_DATA = "_data"  # what the first part of a stored weight is called, after the weight
_SCALED = (SCALED_MM, DEQUANTIZE, QUANTIZE, FAKE_QUANTIZE)
aten = torch.ops.aten
_MOVES = (aten.view.default, aten.permute.default, aten.t.default)


def is_scaled(node: torch.fx.Node) -> bool:
    """Whether ``node`` calls an operator that quantizes, or that reads what is quantized."""
    return node.target in _SCALED


def stored_weight(node: Any) -> torch.fx.Node | None:
    """The ``dequantize`` of stored codes that ``node`` is, or merely moves; None elsewhere."""
    while isinstance(node, torch.fx.Node) and node.target in _MOVES:
        node = node.args[0]
    is_weight = (isinstance(node, torch.fx.Node) and node.target is DEQUANTIZE
                 and all(part.op == "get_attr" for part in _parts(node.args[0])))
    return node if is_weight else None


def stored_records(rewriter: Rewriter, node: torch.fx.Node) -> list[TensorRecord]:
    """Records of a product, or of a lookup, that reads codes."""
    if node.target is SCALED_MM:
        arguments: Any = node.args
        x, w, _, x_name, w_name, k = arguments
        product: Any = node.meta["val"]
        records = [] if w_name in PLAIN else [
            _weight(rewriter, node, _parts(w), str(w_name), "fprop.w",
                    (product.shape[-1], k))]
        return records + ([] if x_name in PLAIN else [_activation(node, x)])
    if node.target is DEQUANTIZE:
        looked_up = [part.args[0] if part.target is aten.index.Tensor else part
                     for part in _parts(node.args[0])]
        if stored_weight(node) is None and all(part.op == "get_attr" for part in looked_up):
            table: Any = looked_up[0].meta["val"]
            shape = (table.shape[0], node.meta["val"].shape[-1])
            return [_weight(rewriter, node, looked_up, str(node.args[1]), "embedding", shape)]
    return []


def contraction_records(
    rewriter: Rewriter, node: torch.fx.Node, x: Any, weight: torch.fx.Node
) -> list[TensorRecord]:
    """Records of an operator whose weight, ``weight``, is stored, and that reads ``x``."""
    shape = tuple(weight.meta["val"].shape)
    name = str(weight.args[1])
    records = [_weight(rewriter, node, _parts(weight.args[0]), name, "fprop.w", shape)]
    return records + ([_activation(node, x)] if x.target is FAKE_QUANTIZE else [])


def _parts(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else [given]


def _weight(rewriter: Rewriter, node: torch.fx.Node, parts: Sequence[torch.fx.Node], name: str,
            role: Role, shape: tuple[int, ...]) -> TensorRecord:
    tensors = [tensor for part in parts if (tensor := rewriter.tensor(part)) is not None]
    sizes = tuple(map(int, shape))
    return TensorRecord(
        node=node.name, op=str(node.target), operand=str(parts[0].target).removesuffix(_DATA),
        role=role, shape=sizes, decided_by=BY, format=str(parse(name)),
        scale_kind="weight", nbytes=sum(tensor.nbytes for tensor in tensors),
        nbytes_high=math.prod(sizes) * node.meta["val"].element_size(), source=source_line(node))


def _activation(node: torch.fx.Node, quantized: Any) -> TensorRecord:
    first: Any = _parts(quantized)[0]
    call: Any = first if first.target in (QUANTIZE, FAKE_QUANTIZE) else first.args[0]
    is_static = len(call.args) > 5 and call.args[5] is not None
    return TensorRecord(
        node=node.name, op=str(node.target), operand=call.args[0].name, role="fprop.x",
        shape=shape_of(call.args[0]), decided_by=BY, format=str(parse(call.args[1])),
        scale_kind="static" if is_static else "dynamic", source=source_line(node))
