"""Arithmetic on sizes: one-element vectors, int64 (float64 after a true division)."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.context import Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.backends.onnxruntime.shapes import Dim, Size
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten


@lowers(aten.sym_size.int)
def sym_size(ctx: Context, node: Node, x: Node, dim: int) -> Dim:
    return ctx.size(x, dim)


@lowers(aten.sym_numel.default)
def sym_numel(ctx: Context, node: Node, x: Node) -> Dim:
    count = ctx.op("Reshape", ctx.op("Size", ctx.value(x)), ctx.ints([1]))
    return ctx.symbol(node, count)


@lowers(aten.sym_stride.int)
def sym_stride(ctx: Context, node: Node, x: Node, dim: int) -> Any:
    raise LoweringError(f"{describe(node)}: strides do not exist in ONNX; remedy: use shapes")


def _vector(ctx: Context, arg: Any, dtype: torch.dtype) -> ir.Value:
    """A symbolic number or a Python number as a one-element vector of ``dtype``."""
    if isinstance(arg, Node):
        result = ctx.result(arg)
        if isinstance(result, Size):
            return ctx.cast(result.vector(), ctx.dtype(arg), dtype)
        if isinstance(result, (bool, int, float)):
            arg = result
        else:
            return ctx.op("Reshape", ctx.value(arg, dtype), ctx.ints([1]))
    return ctx.builder.constant(*_array([arg], dtype))


def _array(values: list[Any], dtype: torch.dtype) -> tuple[Any, Any]:
    array = torch.tensor(values, dtype=dtype).numpy()
    return array, array.dtype


def _common(ctx: Context, args: tuple[Any, ...]) -> torch.dtype:
    kinds = [ctx.dtype(arg) for arg in args]
    return torch.float64 if any(kind.is_floating_point for kind in kinds) else torch.int64


def _register(targets: tuple[Any, ...], emit: Callable[..., ir.Value],
              dtype: torch.dtype | None = None) -> None:  # fmt: skip
    @lowers(*targets)
    def _symbolic(ctx: Context, node: Node, *args: Any) -> Dim:  # pyright: ignore[reportUnusedFunction]
        kind = dtype or _common(ctx, args)
        return ctx.symbol(node, emit(ctx, *[_vector(ctx, arg, kind) for arg in args]))


def _simple(op_type: str) -> Callable[..., ir.Value]:
    return lambda ctx, *vectors: ctx.op(op_type, *vectors)


def _floordiv(ctx: Context, x: ir.Value, y: ir.Value) -> ir.Value:
    return ctx.op("Div", ctx.op("Sub", x, ctx.op("Mod", x, y)), y)


def _different(ctx: Context, x: ir.Value, y: ir.Value) -> ir.Value:
    return ctx.op("Not", ctx.op("Equal", x, y))


def _integer(op_type: str | None) -> Callable[..., ir.Value]:
    def emit(ctx: Context, x: ir.Value) -> ir.Value:
        rounded = ctx.op(op_type, x) if op_type else x
        return ctx.op("Cast", rounded, to=int(ir.DataType.INT64))

    return emit


_register((operator.add,), _simple("Add"))
_register((operator.sub,), _simple("Sub"))
_register((operator.mul,), _simple("Mul"))
_register((operator.floordiv,), _floordiv, torch.int64)
_register((operator.mod,), _simple("Mod"), torch.int64)
_register((operator.neg,), _simple("Neg"))
_register((operator.truediv,), _simple("Div"), torch.float64)
_register((operator.pow,), _simple("Pow"))
_register((operator.eq,), _simple("Equal"))
_register((operator.ne,), _different)
_register((operator.lt,), _simple("Less"))
_register((operator.le,), _simple("LessOrEqual"))
_register((operator.gt,), _simple("Greater"))
_register((operator.ge,), _simple("GreaterOrEqual"))
_register((operator.and_,), _simple("And"), torch.bool)
_register((operator.or_,), _simple("Or"), torch.bool)
_register((torch.sym_not, operator.not_), _simple("Not"), torch.bool)
_register((torch.sym_max, builtins.max), _simple("Max"))
_register((torch.sym_min, builtins.min), _simple("Min"))
_register((torch.sym_float,), lambda ctx, x: x, torch.float64)
_register((torch.sym_int, math.trunc), _integer(None), torch.float64)
_register((math.floor,), _integer("Floor"), torch.float64)
_register((math.ceil,), _integer("Ceil"), torch.float64)
_register((torch._sym_sqrt, math.sqrt), _simple("Sqrt"), torch.float64)  # pyright: ignore[reportAttributeAccessIssue]


@lowers(torch.sym_sum)
def sym_sum(ctx: Context, node: Node, args: Any) -> Dim:
    total = ctx.op("Sum", *[_vector(ctx, arg, torch.float64) for arg in args])
    return ctx.symbol(node, ctx.op("Cast", total, to=int(ir.DataType.INT64)))


@lowers(aten._local_scalar_dense.default, aten.item.default)
def item(ctx: Context, node: Node, x: Node) -> Dim:
    return ctx.symbol(node, ctx.op("Reshape", ctx.value(x, ctx.dtype(node)), ctx.ints([1])))


def _nothing(ctx: Context, node: Node, *_args: Any, **_options: Any) -> None:
    """What only checks the trace's assumptions leaves nothing in the graph."""


lowers(
    aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default,
    aten._assert_scalar.default, aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)(_nothing)  # fmt: skip
