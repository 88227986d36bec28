"""Comparisons, boolean and bitwise operators, selection."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.promotion import computable, result_type
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers

aten = torch.ops.aten

_COMPARISONS: dict[str, str] = {
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
    "ne": "Equal",
}  # fmt: skip


def _register_comparison(name: str, op_type: str) -> None:
    packet = getattr(aten, name)

    @lowers(packet.Tensor, packet.Scalar)
    def _compare(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:  # pyright: ignore[reportUnusedFunction]
        dtype = computable(result_type(ctx, x, y))
        result = ctx.op(op_type, *ctx.values((x, y), dtype))
        return ctx.op("Not", result) if name == "ne" else result


for _name, _op in _COMPARISONS.items():
    _register_comparison(_name, _op)


def _register_logical(target: Any, op_type: str) -> None:
    @lowers(target)
    def _logical(ctx: Context, node: Node, *args: Arg) -> ir.Value:  # pyright: ignore[reportUnusedFunction]
        return ctx.op(op_type, *ctx.values(args, torch.bool))


for _target, _op in {
    aten.logical_and.default: "And", aten.logical_or.default: "Or",
    aten.logical_xor.default: "Xor", aten.logical_not.default: "Not",
}.items():  # fmt: skip
    _register_logical(_target, _op)


def _register_bitwise(name: str, on_bool: str, on_integers: str) -> None:
    packet = getattr(aten, name)
    overloads = [getattr(packet, o) for o in packet.overloads() if o in ("default", "Tensor",
                                                                        "Scalar")]

    @lowers(*overloads)
    def _bitwise(ctx: Context, node: Node, *args: Arg) -> ir.Value:  # pyright: ignore[reportUnusedFunction]
        dtype = ctx.dtype(node)
        op_type = on_bool if dtype is torch.bool else on_integers
        return ctx.op(op_type, *ctx.values(args, dtype))


_register_bitwise("bitwise_and", "And", "BitwiseAnd")
_register_bitwise("bitwise_or", "Or", "BitwiseOr")
_register_bitwise("bitwise_xor", "Xor", "BitwiseXor")
_register_bitwise("bitwise_not", "Not", "BitwiseNot")


def select(ctx: Context, condition: ir.Value, x: ir.Value, y: ir.Value, dtype: torch.dtype
           ) -> ir.Value:  # fmt: skip
    """``Where`` for every dtype; its kernel has no booleans and no narrow integers."""
    wide = torch.uint8 if dtype is torch.bool else computable(dtype)
    if dtype is torch.uint8:
        wide = dtype
    chosen = ctx.op("Where", condition, ctx.cast(x, dtype, wide), ctx.cast(y, dtype, wide))
    return ctx.cast(chosen, wide, dtype)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(ctx: Context, node: Node, condition: Arg, x: Arg, y: Arg) -> ir.Value:
    dtype = ctx.dtype(node)
    return select(ctx, ctx.value(condition, torch.bool), ctx.value(x, dtype),
                  ctx.value(y, dtype), dtype)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(ctx: Context, node: Node, x: Arg, mask: Arg, value: Arg) -> ir.Value:
    dtype = ctx.dtype(node)
    filler, kept = ctx.values((value, x), dtype)
    return select(ctx, ctx.value(mask), filler, kept, dtype)
