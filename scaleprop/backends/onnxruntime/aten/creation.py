"""Tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.backends.onnxruntime.shapes import Dim
from scaleprop.backends.onnxruntime.types import held, onnx_type

aten = torch.ops.aten


def filled(ctx: Context, sizes: Sequence[Dim], value: Arg, dtype: torch.dtype) -> ir.Value:
    """A tensor of one value: ``ConstantOfShape``, or ``Expand`` of a computed one."""
    shape = ctx.shape_vector(sizes)
    if isinstance(value, Node):
        return ctx.op("Expand", ctx.value(value, dtype), shape)
    one = torch.tensor([value], dtype=held(dtype)).numpy()
    return ctx.op("ConstantOfShape", shape, value=ir.tensor(np.ascontiguousarray(one)))


@lowers(aten.full.default)
def full(ctx: Context, node: Node, size: Sequence[Any], value: Arg, **_options: Any) -> ir.Value:
    return filled(ctx, [ctx.dim(dim) for dim in size], value, ctx.dtype(node))


@lowers(aten.zeros.default, aten.empty.memory_format, aten.empty_permuted.default)
def zeros(ctx: Context, node: Node, size: Sequence[Any], *_order: Any, **_options: Any) -> ir.Value:
    """Zeros; also for ``empty``, whose contents are anything."""
    return filled(ctx, [ctx.dim(dim) for dim in size], 0, ctx.dtype(node))


@lowers(aten.ones.default)
def ones(ctx: Context, node: Node, size: Sequence[Any], **_options: Any) -> ir.Value:
    return filled(ctx, [ctx.dim(dim) for dim in size], 1, ctx.dtype(node))


@lowers(aten.full_like.default)
def full_like(ctx: Context, node: Node, x: Node, value: Arg, **_options: Any) -> ir.Value:
    return filled(ctx, ctx.sizes(x), value, ctx.dtype(node))


@lowers(aten.zeros_like.default, aten.empty_like.default)
def zeros_like(ctx: Context, node: Node, x: Node, **_options: Any) -> ir.Value:
    return filled(ctx, ctx.sizes(x), 0, ctx.dtype(node))


@lowers(aten.ones_like.default)
def ones_like(ctx: Context, node: Node, x: Node, **_options: Any) -> ir.Value:
    return filled(ctx, ctx.sizes(x), 1, ctx.dtype(node))


@lowers(aten.new_zeros.default, aten.new_empty.default)
def new_zeros(ctx: Context, node: Node, x: Node, size: Sequence[Any], **_options: Any) -> ir.Value:
    return filled(ctx, [ctx.dim(dim) for dim in size], 0, ctx.dtype(node))


@lowers(aten.new_ones.default)
def new_ones(ctx: Context, node: Node, x: Node, size: Sequence[Any], **_options: Any) -> ir.Value:
    return filled(ctx, [ctx.dim(dim) for dim in size], 1, ctx.dtype(node))


@lowers(aten.new_full.default)
def new_full(ctx: Context, node: Node, x: Node, size: Sequence[Any], value: Arg, **_options: Any
             ) -> ir.Value:  # fmt: skip
    return filled(ctx, [ctx.dim(dim) for dim in size], value, ctx.dtype(node))


@lowers(aten.fill.Scalar, aten.fill.Tensor)
def fill(ctx: Context, node: Node, x: Node, value: Arg) -> ir.Value:
    return filled(ctx, ctx.sizes(x), value, ctx.dtype(node))


@lowers(aten.copy.default)
def copy(ctx: Context, node: Node, x: Node, source: Node, non_blocking: bool = False) -> ir.Value:
    value = ctx.value(source, ctx.dtype(node))
    if ctx.sizes(x) == ctx.sizes(source):
        return value
    return ctx.op("Expand", value, ctx.shape_vector(ctx.sizes(x)))


@lowers(aten.scalar_tensor.default)
def scalar_tensor(ctx: Context, node: Node, value: Arg, **_options: Any) -> ir.Value:
    return ctx.value(value, ctx.dtype(node))


@lowers(aten.arange.start_step)
def arange(ctx: Context, node: Node, start: Arg, end: Arg, step: Arg = 1, **_options: Any
           ) -> ir.Value:  # fmt: skip
    return _range(ctx, node, start, end, step)


@lowers(aten.arange.start)
def arange_start(ctx: Context, node: Node, start: Arg, end: Arg, **_options: Any) -> ir.Value:
    return _range(ctx, node, start, end, 1)


@lowers(aten.arange.default)
def arange_end(ctx: Context, node: Node, end: Arg, **_options: Any) -> ir.Value:
    return _range(ctx, node, 0, end, 1)


def _range(ctx: Context, node: Node, start: Arg, end: Arg, step: Arg) -> ir.Value:
    dtype = ctx.dtype(node)
    exact = all(not ctx.dtype(arg).is_floating_point for arg in (start, end, step))
    wide = torch.int64 if exact else torch.float64  # counted exactly, then rounded once
    key = ("range", wide, *[_key(ctx, arg) for arg in (start, end, step)])
    if key not in ctx.memo:
        ctx.memo[key] = ctx.op("Range", *ctx.values((start, end, step), wide))
    value = ctx.memo[key]
    if wide == dtype:
        return value
    return ctx.op("Cast", value, to=int(onnx_type(held(dtype))))


def _key(ctx: Context, arg: Arg) -> Any:
    if not isinstance(arg, Node):
        return arg
    result = ctx.result(arg)
    return getattr(result, "expression", result)
