"""Norms spelled out in elementary operators become ``rms_norm`` and ``layer_norm``.

    x · rsqrt(mean(x²) + ε)                       →  rms_norm(x, [D], None, ε)
    c · rsqrt(mean(c²) + ε), c = x − mean(x)      →  layer_norm(x, [D], None, None, ε)
    … · w,  … · (1 + w),  (…) · w + b             →  with weight (and bias)

Also with ``x / sqrt(…)`` and ``x · (…)^(−½)``. A cast in between ends the match: what follows it
stays as it was, so that a model in bfloat16 rounds where it always did.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx

from scaleprop.passes.canonicalise.match import (
    argument,
    aten,
    dtype_of,
    is_call,
    other_operand,
    refuse,
    sizes,
)
from scaleprop.passes.rewrite import Rewriter


def rewrite(rewriter: Rewriter) -> int:
    """Rewrite in place; returns how many."""
    count = 0
    for node in list(rewriter.graph.nodes):
        if is_call(node, aten.mul.Tensor, aten.div.Tensor):
            count += _normalised(rewriter, node)
    for node in list(rewriter.graph.nodes):
        if is_call(node, aten.mul.Tensor):
            _absorb_weight(rewriter, node)
    for node in list(rewriter.graph.nodes):
        if is_call(node, aten.add.Tensor):
            _absorb_bias(rewriter, node)
    return count


def _normalised(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    """``node`` = x / sqrt(mean(x²) + ε) in any spelling."""
    found = _deviation(node)
    if found is None:
        return False
    x, squares, eps = found
    width = sizes(x)[-1:]
    if len(width) != 1 or not isinstance(width[0], int):
        refuse(node, "its last axis has no fixed size")
        return False
    if dtype_of(x) != dtype_of(node):
        refuse(node, "it changes the dtype")
        return False
    if _is_mean_square_of(squares, x):
        centred = _centred(x)
        if centred is not None:
            op, args = aten.layer_norm.default, (centred, list(width), None, None, eps)
        else:
            op, args = aten.rms_norm.default, (x, list(width), None, eps)
    elif (source := _centred(x)) is not None and _is_variance_of(squares, source):
        op, args = aten.layer_norm.default, (source, list(width), None, None, eps)
    else:
        refuse(node, "what it divides by is no mean square of what it divides")
        return False
    why = f"{op} spelled out"
    rewriter.replace(node, rewriter.call(op, args, at=node, why=why))
    return True


def _deviation(node: torch.fx.Node) -> tuple[Any, Any, float] | None:
    """(x, s, ε) where ``node`` = x / sqrt(s + ε)."""
    if node.target is aten.div.Tensor:
        x, root = node.args[:2]
        if not is_call(root, aten.sqrt.default):
            return None
        return _with_eps(x, root.args[0])  # type: ignore[union-attr]
    for x, root in (node.args[:2], node.args[1::-1]):
        inverse_root = is_call(root, aten.rsqrt.default) or (
            is_call(root, aten.pow.Tensor_Scalar) and root.args[1] == -0.5  # type: ignore[union-attr]
        )
        if inverse_root and isinstance(x, torch.fx.Node):
            return _with_eps(x, root.args[0])  # type: ignore[union-attr]
    return None


def _with_eps(x: Any, total: Any) -> tuple[Any, Any, float] | None:
    if not is_call(total, aten.add.Tensor, aten.add.Scalar) or total.kwargs:
        return None
    squares, eps = total.args[:2]
    if isinstance(eps, torch.fx.Node) or not isinstance(squares, torch.fx.Node):
        return None
    is_positive = isinstance(eps, (int, float)) and eps > 0 and math.isfinite(eps)
    return (x, squares, float(eps)) if is_positive else None


def _reduces_last_axis(node: torch.fx.Node) -> bool:
    """Over the last axis only, which stays with size 1."""
    dims: Any = argument(node, 1, "dim")
    rank = len(sizes(node))
    return (
        isinstance(dims, (list, tuple))
        and [dim % rank for dim in dims] == [rank - 1]
        and (argument(node, 2, "keepdim", False) or node.kwargs.get("keepdim", False)) is True
    )


def _is_mean_square_of(node: Any, x: Any) -> bool:
    if not is_call(node, aten.mean.dim) or not _reduces_last_axis(node):
        return False
    square = node.args[0]
    if is_call(square, aten.pow.Tensor_Scalar):
        return square.args[0] is x and square.args[1] == 2
    return is_call(square, aten.mul.Tensor) and square.args[0] is x and square.args[1] is x


def _is_variance_of(node: Any, x: Any) -> bool:
    """var(x, correction=0) over the last axis."""
    if not is_call(node, aten.var.correction):
        return False
    dims: Any = argument(node, 1, "dim")
    rank = len(sizes(node))
    return (
        node.args[0] is x
        and isinstance(dims, (list, tuple))
        and [dim % rank for dim in dims] == [rank - 1]
        and node.kwargs.get("correction", 1) == 0
        and node.kwargs.get("keepdim", False) is True
    )


def _centred(x: Any) -> Any:
    """y where ``x`` = y − mean(y)."""
    if not is_call(x, aten.sub.Tensor) or x.kwargs:
        return None
    source, mean = x.args[:2]
    if not is_call(mean, aten.mean.dim) or not _reduces_last_axis(mean):
        return None
    return source if mean.args[0] is source else None


def _absorb_weight(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    """norm(x) · w, where w has the size of the last axis."""
    for norm in node.args[:2]:
        if not is_call(norm, aten.rms_norm.default, aten.layer_norm.default):
            continue
        inner: Any = norm
        weight = other_operand(node, inner)
        if argument(inner, 2, "weight") is not None or len(inner.users) != 1:
            refuse(node, "the norm has a weight or another reader")
            continue
        if not isinstance(weight, torch.fx.Node) or sizes(weight) != sizes(inner)[-1:]:
            refuse(node, "what it is multiplied with is no weight vector")
            continue
        if dtype_of(weight) != dtype_of(node):
            refuse(node, "the weight has another dtype")
            continue
        args = (*inner.args[:2], weight, *inner.args[3:])
        why = "the norm's weight"
        rewriter.replace(node, rewriter.call(inner.target, args, at=node, why=why))
        return True
    return False


def _absorb_bias(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    """layer_norm(x, w) + b, where b has the size of the last axis."""
    if node.kwargs:
        return False
    for norm in node.args[:2]:
        if not is_call(norm, aten.layer_norm.default):
            continue
        inner: Any = norm
        bias = other_operand(node, inner)
        if argument(inner, 2, "weight") is None or argument(inner, 3, "bias") is not None:
            refuse(node, "the norm has no weight, or a bias already")
            continue
        if rewriter.tensor(bias) is None or sizes(bias) != sizes(inner)[-1:]:
            refuse(node, "what is added is no bias vector")
            continue
        if len(inner.users) != 1 or dtype_of(bias) != dtype_of(node):
            refuse(node, "the norm has another reader, or the bias another dtype")
            continue
        args = (*inner.args[:3], bias, *inner.args[4:])
        why = "the norm's bias"
        rewriter.replace(node, rewriter.call(inner.target, args, at=node, why=why))
        return True
    return False
