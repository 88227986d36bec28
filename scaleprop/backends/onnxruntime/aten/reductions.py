"""Reductions and running sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.promotion import computable
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers

aten = torch.ops.aten
Axes = int | Sequence[int] | None


def reduce(
    ctx: Context, op_type: str, x: ir.Value, rank: int, dims: Axes, keepdim: bool
) -> ir.Value:
    """An ONNX reduction over some axes; over all where ``dims`` is None or empty."""
    if rank == 0:
        return x
    wanted = [dims] if isinstance(dims, int) else list(dims or range(rank))
    axes = sorted({dim % rank for dim in wanted})
    return ctx.op(op_type, x, ctx.ints(axes), keepdims=int(keepdim))


def _reduction(ctx: Context, node: Node, op_type: str, x: Node, dims: Axes, keepdim: bool
               ) -> ir.Value:  # fmt: skip
    dtype = ctx.dtype(node)
    wide = computable(dtype)
    return ctx.cast(reduce(ctx, op_type, ctx.value(x, wide), ctx.rank(x), dims, keepdim), wide,
                    dtype)


@lowers(aten.sum.dim_IntList)
def sum_dim(ctx: Context, node: Node, x: Node, dims: Axes, keepdim: bool = False, *,
            dtype: torch.dtype | None = None) -> ir.Value:  # fmt: skip
    return _reduction(ctx, node, "ReduceSum", x, dims, keepdim)


@lowers(aten.sum.default)
def sum_all(ctx: Context, node: Node, x: Node, *, dtype: torch.dtype | None = None) -> ir.Value:
    return _reduction(ctx, node, "ReduceSum", x, None, False)


@lowers(aten.mean.dim)
def mean_dim(ctx: Context, node: Node, x: Node, dims: Axes, keepdim: bool = False, *,
             dtype: torch.dtype | None = None) -> ir.Value:  # fmt: skip
    return _reduction(ctx, node, "ReduceMean", x, dims, keepdim)


@lowers(aten.mean.default)
def mean_all(ctx: Context, node: Node, x: Node, *, dtype: torch.dtype | None = None) -> ir.Value:
    return _reduction(ctx, node, "ReduceMean", x, None, False)


@lowers(aten.prod.dim_int)
def prod_dim(ctx: Context, node: Node, x: Node, dim: int, keepdim: bool = False, *,
             dtype: torch.dtype | None = None) -> ir.Value:  # fmt: skip
    return _reduction(ctx, node, "ReduceProd", x, dim, keepdim)


@lowers(aten.prod.default)
def prod_all(ctx: Context, node: Node, x: Node, *, dtype: torch.dtype | None = None) -> ir.Value:
    return _reduction(ctx, node, "ReduceProd", x, None, False)


@lowers(aten.amax.default, aten.any.dim, aten.any.dims)
def amax(ctx: Context, node: Node, x: Node, dims: Axes = None, keepdim: bool = False) -> ir.Value:
    return _extreme(ctx, node, "ReduceMax", x, dims, keepdim)


@lowers(aten.amin.default, aten.all.dim, aten.all.dims)
def amin(ctx: Context, node: Node, x: Node, dims: Axes = None, keepdim: bool = False) -> ir.Value:
    return _extreme(ctx, node, "ReduceMin", x, dims, keepdim)


@lowers(aten.max.default, aten.any.default)
def max_all(ctx: Context, node: Node, x: Node) -> ir.Value:
    return _extreme(ctx, node, "ReduceMax", x, None, False)


@lowers(aten.min.default, aten.all.default)
def min_all(ctx: Context, node: Node, x: Node) -> ir.Value:
    return _extreme(ctx, node, "ReduceMin", x, None, False)


def _extreme(ctx: Context, node: Node, op_type: str, x: Node, dims: Axes, keepdim: bool
             ) -> ir.Value:  # fmt: skip
    """Largest or smallest; for ``any`` and ``all`` of the truth values."""
    dtype = ctx.dtype(node)
    value = ctx.cast(ctx.value(x), ctx.dtype(x), dtype)  # any(floats) asks which are not zero
    wide = computable(dtype)
    result = reduce(ctx, op_type, ctx.cast(value, dtype, wide), ctx.rank(x), dims, keepdim)
    return ctx.cast(result, wide, dtype)


@lowers(aten.max.dim, aten.min.dim)
def extreme_dim(ctx: Context, node: Node, x: Node, dim: int, keepdim: bool = False
                ) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    kind = "Max" if node.target is aten.max.dim else "Min"
    dtype = ctx.dtype(x)
    value = ctx.value(x, computable(dtype))
    largest = reduce(ctx, f"Reduce{kind}", value, ctx.rank(x), dim, keepdim)
    return ctx.cast(largest, computable(dtype), dtype), _arg(ctx, f"Arg{kind}", x, dim, keepdim)


@lowers(aten.argmax.default, aten.argmin.default)
def argmax(ctx: Context, node: Node, x: Node, dim: int | None = None, keepdim: bool = False
           ) -> ir.Value:  # fmt: skip
    op_type = "ArgMax" if node.target is aten.argmax.default else "ArgMin"
    return _arg(ctx, op_type, x, dim, keepdim)


def _arg(ctx: Context, op_type: str, x: Node, dim: int | None, keepdim: bool) -> ir.Value:
    wide = computable(ctx.dtype(x))
    # no kernel for int64: double holds every index and count below 2^53
    value = ctx.value(x, torch.float64 if wide is torch.int64 else wide)
    if dim is None:
        value = ctx.op("Reshape", value, ctx.ints([-1]))
        found = ctx.op(op_type, value, axis=0, keepdims=0)
        shape = [1] * ctx.rank(x)
        return ctx.op("Reshape", found, ctx.ints(shape)) if keepdim else found
    return ctx.op(op_type, value, axis=dim % max(ctx.rank(x), 1), keepdims=int(keepdim))


@lowers(aten.logsumexp.default)
def logsumexp(ctx: Context, node: Node, x: Node, dims: Axes, keepdim: bool = False) -> ir.Value:
    return _reduction(ctx, node, "ReduceLogSumExp", x, dims, keepdim)


@lowers(aten.var.correction, aten.std.correction)
def var(
    ctx: Context, node: Node, x: Node, dims: Axes = None, *, correction: Arg | None = None,
    keepdim: bool = False,
) -> ir.Value:  # fmt: skip
    dtype, rank = ctx.dtype(node), ctx.rank(x)
    value = ctx.value(x, dtype)
    centred = ctx.op("Sub", value, reduce(ctx, "ReduceMean", value, rank, dims, True))
    squares = ctx.op("Mul", centred, centred)
    total = reduce(ctx, "ReduceSum", squares, rank, dims, keepdim)
    ones = ctx.op("Div", ctx.op("Size", value), ctx.op("Size", total))
    count = ctx.cast(ones, torch.int64, dtype)
    free = ctx.op("Sub", count, ctx.value(1 if correction is None else correction, dtype))
    result = ctx.op("Div", total, ctx.op("Relu", free))
    return ctx.op("Sqrt", result) if node.target is aten.std.correction else result


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    ctx: Context, node: Node, x: Node, order: Arg = 2, dims: Axes = None, keepdim: bool = False,
    **_options: Any,
) -> ir.Value:  # fmt: skip
    dtype, rank = ctx.dtype(node), ctx.rank(x)
    if order == 2:
        return _reduction(ctx, node, "ReduceL2", x, dims, keepdim)
    if order == 1:
        return _reduction(ctx, node, "ReduceL1", x, dims, keepdim)
    size = ctx.op("Abs", ctx.value(x, dtype))
    if order in (float("inf"), float("-inf")):
        kind = "ReduceMax" if order == float("inf") else "ReduceMin"
        return reduce(ctx, kind, size, rank, dims, keepdim)
    powers = ctx.op("Pow", size, ctx.value(order, dtype))
    total = reduce(ctx, "ReduceSum", powers, rank, dims, keepdim)
    return ctx.op("Pow", total, ctx.op("Reciprocal", ctx.value(order, dtype)))


@lowers(aten.cumsum.default)
def cumsum(ctx: Context, node: Node, x: Node, dim: int, *, dtype: torch.dtype | None = None
           ) -> ir.Value:  # fmt: skip
    kind = ctx.dtype(node)
    if ctx.rank(x) == 0:
        return ctx.value(x, kind)
    total = ctx.op("CumSum", ctx.value(x, computable(kind)),
                   ctx.number(dim % ctx.rank(x), torch.int64))
    return ctx.cast(total, computable(kind), kind)
