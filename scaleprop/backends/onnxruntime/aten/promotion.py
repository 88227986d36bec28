"""ATen's type promotion, and the types that onnxruntime's CPU kernels have."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.context import Arg, Context, Node

_NARROW = (torch.int8, torch.uint8, torch.int16)


def computable(dtype: torch.dtype) -> torch.dtype:
    """The dtype to do arithmetic in: most kernels exist for int32, int64, float and double only."""
    return torch.int32 if dtype in _NARROW or dtype is torch.bool else dtype


def result_type(ctx: Context, *args: Arg) -> torch.dtype:
    """``torch.result_type`` of nodes and numbers."""
    found = _operand(ctx, args[0])
    if len(args) == 1:
        return ctx.dtype(args[0])
    dtype = torch.result_type(found, _operand(ctx, args[1]))
    for arg in args[2:]:
        dtype = torch.promote_types(dtype, torch.result_type(found, _operand(ctx, arg)))
    return dtype


def _operand(ctx: Context, arg: Arg) -> Any:
    value = ctx.meta(arg)
    if isinstance(value, torch.SymInt):
        return 1
    if isinstance(value, torch.SymFloat):
        return 1.0
    return True if isinstance(value, torch.SymBool) else value


def arithmetic(ctx: Context, node: Node, op_type: str, *args: Arg, **attributes: Any) -> ir.Value:
    """An ONNX operator on the arguments in the node's own dtype, widened where kernels lack it."""
    dtype = ctx.dtype(node)
    wide = computable(dtype)
    result = ctx.op(op_type, *ctx.values(args, wide), **attributes)
    return ctx.cast(result, wide, dtype)


def float_arithmetic(ctx: Context, node: Node, op_type: str, x: Arg, **attributes: Any) -> ir.Value:
    """A unary float operator; integers become the node's float dtype first."""
    return ctx.op(op_type, ctx.value(x, ctx.dtype(node)), **attributes)
