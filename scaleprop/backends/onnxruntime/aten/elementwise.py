"""Arithmetic, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.promotion import arithmetic, computable, float_arithmetic
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers

aten = torch.ops.aten

_FLOAT_UNARY: dict[Any, str] = {
    aten.exp.default: "Exp", aten.log.default: "Log", aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal", aten.sin.default: "Sin", aten.cos.default: "Cos",
    aten.tan.default: "Tan", aten.tanh.default: "Tanh", aten.asin.default: "Asin",
    aten.acos.default: "Acos", aten.atan.default: "Atan", aten.sinh.default: "Sinh",
    aten.cosh.default: "Cosh", aten.erf.default: "Erf", aten.sigmoid.default: "Sigmoid",
}  # fmt: skip
_UNARY: dict[Any, str] = {
    aten.abs.default: "Abs", aten.neg.default: "Neg", aten.sign.default: "Sign",
}  # fmt: skip
_ROUNDING: dict[Any, str] = {
    aten.floor.default: "Floor", aten.ceil.default: "Ceil", aten.round.default: "Round",
}  # fmt: skip
_BINARY: dict[Any, str] = {
    aten.mul.Tensor: "Mul", aten.mul.Scalar: "Mul",
    aten.maximum.default: "Max", aten.minimum.default: "Min",
}  # fmt: skip


def _register_unary(target: Any, op_type: str, emit: Callable[..., ir.Value]) -> None:
    @lowers(target)
    def _unary(ctx: Context, node: Node, x: Arg) -> ir.Value:  # pyright: ignore[reportUnusedFunction]
        return emit(ctx, node, op_type, x)


def _round(ctx: Context, node: Node, op_type: str, x: Arg) -> ir.Value:
    return ctx.op(op_type, ctx.value(x)) if ctx.dtype(node).is_floating_point else ctx.value(x)


for _target, _op in _FLOAT_UNARY.items():
    _register_unary(_target, _op, float_arithmetic)
for _target, _op in _UNARY.items():
    _register_unary(_target, _op, arithmetic)
for _target, _op in _ROUNDING.items():
    _register_unary(_target, _op, _round)


def _register_binary(target: Any, op_type: str) -> None:
    @lowers(target)
    def _binary(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:  # pyright: ignore[reportUnusedFunction]
        if op_type == "Mul" and ctx.dtype(node) is torch.bool:
            return ctx.op("And", ctx.value(x), ctx.value(y))
        return arithmetic(ctx, node, op_type, x, y)


for _target, _op in _BINARY.items():
    _register_binary(_target, _op)


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(ctx: Context, node: Node, x: Arg, y: Arg, alpha: Arg = 1) -> ir.Value:
    if ctx.dtype(node) is torch.bool:
        return ctx.op("Or", ctx.value(x), ctx.value(y))
    return _scaled_sum(ctx, node, "Add", x, y, alpha)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(ctx: Context, node: Node, x: Arg, y: Arg, alpha: Arg = 1) -> ir.Value:
    return _scaled_sum(ctx, node, "Sub", x, y, alpha)


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(ctx: Context, node: Node, x: Arg, y: Arg, alpha: Arg = 1) -> ir.Value:
    dtype = computable(ctx.dtype(node))
    scaled = ctx.value(x, dtype)
    if alpha != 1:
        scaled = ctx.op("Mul", scaled, ctx.value(alpha, dtype))
    return ctx.cast(ctx.op("Sub", ctx.value(y, dtype), scaled), dtype, ctx.dtype(node))


def _scaled_sum(
    ctx: Context, node: Node, op_type: str, x: Arg, y: Arg, alpha: Arg
) -> ir.Value:
    dtype = computable(ctx.dtype(node))
    other = ctx.value(y, dtype)
    if alpha != 1:
        other = ctx.op("Mul", other, ctx.value(alpha, dtype))
    return ctx.cast(ctx.op(op_type, ctx.value(x, dtype), other), dtype, ctx.dtype(node))


@lowers(aten.div.Tensor, aten.div.Scalar)
def div(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:
    return arithmetic(ctx, node, "Div", x, y)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(
    ctx: Context, node: Node, x: Arg, y: Arg, rounding_mode: str | None = None
) -> ir.Value:
    if rounding_mode == "floor":
        return floor_divide(ctx, node, x, y)
    quotient = arithmetic(ctx, node, "Div", x, y)
    if rounding_mode is None or not ctx.dtype(node).is_floating_point:
        return quotient  # integer division truncates already
    return truncated(ctx, quotient)


@lowers(aten.floor_divide.default)
def floor_divide(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:
    dtype = computable(ctx.dtype(node))
    left, right = ctx.values((x, y), dtype)
    if dtype.is_floating_point:
        return ctx.op("Floor", ctx.op("Div", left, right))
    # x − (x mod y) is a multiple of y; ONNX's integer Mod has the sign of the divisor, as floor
    exact = ctx.op("Sub", left, ctx.op("Mod", left, right))
    return ctx.cast(ctx.op("Div", exact, right), dtype, ctx.dtype(node))


def truncated(ctx: Context, x: ir.Value) -> ir.Value:
    """Rounded towards zero."""
    return ctx.op("Mul", ctx.op("Sign", x), ctx.op("Floor", ctx.op("Abs", x)))


@lowers(aten.trunc.default)
def trunc(ctx: Context, node: Node, x: Arg) -> ir.Value:
    value = ctx.value(x)
    return truncated(ctx, value) if ctx.dtype(node).is_floating_point else value


@lowers(aten.fmod.Scalar, aten.fmod.Tensor)
def fmod(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:
    return arithmetic(ctx, node, "Mod", x, y, fmod=1)


@lowers(aten.remainder.Scalar, aten.remainder.Tensor, aten.remainder.Scalar_Tensor)
def remainder(ctx: Context, node: Node, x: Arg, y: Arg) -> ir.Value:
    dtype = computable(ctx.dtype(node))
    left, right = ctx.values((x, y), dtype)
    if not dtype.is_floating_point:
        return ctx.cast(ctx.op("Mod", left, right), dtype, ctx.dtype(node))
    part = ctx.op("Mod", left, right, fmod=1)  # the sign of x; move to the sign of y
    zero = ctx.number(0.0, dtype)
    other_sign = ctx.op("Less", ctx.op("Mul", ctx.op("Sign", part), ctx.op("Sign", right)), zero)
    return ctx.op("Where", other_sign, ctx.op("Add", part, right), part)


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(ctx: Context, node: Node, x: Arg, exponent: Arg) -> ir.Value:
    if exponent == 1:
        return ctx.value(x, ctx.dtype(node))
    if exponent == 0.5:
        return float_arithmetic(ctx, node, "Sqrt", x)
    if exponent == -0.5:
        return rsqrt(ctx, node, x)
    return arithmetic(ctx, node, "Pow", x, exponent)


@lowers(aten.square.default)
def square(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return arithmetic(ctx, node, "Mul", x, x)


@lowers(aten.rsqrt.default)
def rsqrt(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("Reciprocal", float_arithmetic(ctx, node, "Sqrt", x))


@lowers(aten.log2.default, aten.log10.default)
def log_base(ctx: Context, node: Node, x: Arg) -> ir.Value:
    base = 2.0 if node.target is aten.log2.default else 10.0
    natural = float_arithmetic(ctx, node, "Log", x)
    return ctx.op("Mul", natural, ctx.number(1 / math.log(base), ctx.dtype(node)))


@lowers(aten.log1p.default)
def log1p(ctx: Context, node: Node, x: Arg) -> ir.Value:
    """x·log(u)/(u − 1) with u = 1 + x: exact where x is small (Goldberg 1991, theorem 4)."""
    dtype = ctx.dtype(node)
    value, one = ctx.value(x, dtype), ctx.number(1.0, dtype)
    u = ctx.op("Add", one, value)
    tiny = ctx.op("Equal", u, one)
    infinite = ctx.op("Equal", u, ctx.number(math.inf, dtype))
    unit = ctx.op("Where", tiny, one, ctx.op("Sub", u, one))
    careful = ctx.op("Mul", ctx.op("Log", u), ctx.op("Div", value, unit))
    return ctx.op("Where", ctx.op("Or", tiny, infinite), value, careful)


@lowers(aten.expm1.default)
def expm1(ctx: Context, node: Node, x: Arg) -> ir.Value:
    """2·sinh(x/2)·exp(x/2): no cancellation near zero."""
    dtype = ctx.dtype(node)
    half = ctx.op("Mul", ctx.value(x, dtype), ctx.number(0.5, dtype))
    product = ctx.op("Mul", ctx.op("Sinh", half), ctx.op("Exp", half))
    return ctx.op("Mul", product, ctx.number(2.0, dtype))


@lowers(aten.exp2.default)
def exp2(ctx: Context, node: Node, x: Arg) -> ir.Value:
    dtype = ctx.dtype(node)
    return ctx.op("Pow", ctx.number(2.0, dtype), ctx.value(x, dtype))


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(
    ctx: Context, node: Node, x: Arg, low: Arg | None = None, high: Arg | None = None
) -> ir.Value:
    dtype = computable(ctx.dtype(node))
    value = ctx.value(x, dtype)
    if low is not None:
        value = ctx.op("Max", value, ctx.value(low, dtype))
    if high is not None:
        value = ctx.op("Min", value, ctx.value(high, dtype))
    return ctx.cast(value, dtype, ctx.dtype(node))


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(ctx: Context, node: Node, x: Arg, low: Arg) -> ir.Value:
    return clamp(ctx, node, x, low)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(ctx: Context, node: Node, x: Arg, high: Arg) -> ir.Value:
    return clamp(ctx, node, x, None, high)


@lowers(aten.addcmul.default)
def addcmul(ctx: Context, node: Node, x: Arg, a: Arg, b: Arg, value: Arg = 1) -> ir.Value:
    return _add_scaled(ctx, node, x, arithmetic(ctx, node, "Mul", a, b), value)


@lowers(aten.addcdiv.default)
def addcdiv(ctx: Context, node: Node, x: Arg, a: Arg, b: Arg, value: Arg = 1) -> ir.Value:
    return _add_scaled(ctx, node, x, arithmetic(ctx, node, "Div", a, b), value)


def _add_scaled(ctx: Context, node: Node, x: Arg, term: ir.Value, factor: Arg) -> ir.Value:
    dtype = ctx.dtype(node)
    if factor != 1:
        term = ctx.op("Mul", term, ctx.value(factor, dtype))
    return ctx.op("Add", ctx.value(x, dtype), term)


@lowers(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(ctx: Context, node: Node, x: Arg, end: Arg, weight: Arg) -> ir.Value:
    start, stop, share = ctx.values((x, end, weight), ctx.dtype(node))
    return ctx.op("Add", start, ctx.op("Mul", share, ctx.op("Sub", stop, start)))


@lowers(aten.isnan.default)
def isnan(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("IsNaN", ctx.value(x))


@lowers(aten.isinf.default)
def isinf(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("IsInf", ctx.value(x))


@lowers(aten._to_copy.default)
def to_copy(ctx: Context, node: Node, x: Node, **_options: Any) -> ir.Value:
    """A cast. To bfloat16 or float16 it rounds, though the result is held in float32."""
    have, want = ctx.dtype(x), ctx.dtype(node)
    if want in (torch.bfloat16, torch.float16) and have != want:
        return rounded_to(ctx, ctx.value(x, torch.float32), want)
    return ctx.cast(ctx.value(x), have, want)


def rounded_to(ctx: Context, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """float32 values rounded to those of a 16-bit float."""
    from scaleprop.backends.onnxruntime.types import onnx_type

    narrow = ctx.op("Cast", x, to=int(onnx_type(dtype)))
    return ctx.op("Cast", narrow, to=int(ir.DataType.FLOAT))
