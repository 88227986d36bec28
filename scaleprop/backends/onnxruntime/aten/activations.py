"""Activations and softmax."""

from __future__ import annotations

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers

aten = torch.ops.aten

# exp(−64) = 1.6e−28: far below what float32 sees beside 1, far above where it becomes subnormal
SOFTMAX_FLOOR = 64.0


@lowers(aten.relu.default)
def relu(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("Relu", ctx.value(x))


@lowers(aten.gelu.default)
def gelu(ctx: Context, node: Node, x: Arg, approximate: str = "none") -> ir.Value:
    return ctx.op("Gelu", ctx.value(x), approximate=approximate)


@lowers(aten.silu.default)
def silu(ctx: Context, node: Node, x: Arg) -> ir.Value:
    value = ctx.value(x)
    return ctx.op("Mul", value, ctx.op("Sigmoid", value))  # onnxruntime fuses this


@lowers(aten.leaky_relu.default)
def leaky_relu(ctx: Context, node: Node, x: Arg, slope: float = 0.01) -> ir.Value:
    return ctx.op("LeakyRelu", ctx.value(x), alpha=float(slope))


@lowers(aten.elu.default)
def elu(
    ctx: Context, node: Node, x: Arg, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> ir.Value:
    value, dtype = ctx.value(x), ctx.dtype(node)
    if input_scale != 1:
        positive = ctx.op("Relu", value)
        inner = ctx.op("Mul", value, ctx.number(float(input_scale), dtype))
        negative = ctx.op("Elu", ctx.op("Min", inner, ctx.number(0.0, dtype)), alpha=float(alpha))
        value = ctx.op("Add", positive, negative)
    else:
        value = ctx.op("Elu", value, alpha=float(alpha))
    return value if scale == 1 else ctx.op("Mul", value, ctx.number(float(scale), dtype))


@lowers(aten.celu.default)
def celu(ctx: Context, node: Node, x: Arg, alpha: float = 1.0) -> ir.Value:
    return elu(ctx, node, x, alpha, 1, 1.0 / alpha)


@lowers(aten.hardtanh.default)
def hardtanh(ctx: Context, node: Node, x: Arg, low: float = -1, high: float = 1) -> ir.Value:
    dtype = ctx.dtype(node)
    return ctx.op("Clip", ctx.value(x), ctx.number(low, dtype), ctx.number(high, dtype))


@lowers(aten.hardsigmoid.default)
def hardsigmoid(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("HardSigmoid", ctx.value(x), alpha=1 / 6, beta=0.5)


@lowers(aten.hardswish.default)
def hardswish(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("Mul", ctx.value(x), hardsigmoid(ctx, node, x))


def softplus_of(ctx: Context, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """max(x, 0) + log(1 + exp(−|x|)), which never overflows."""
    small = ctx.op("Exp", ctx.op("Neg", ctx.op("Abs", x)))
    tail = ctx.op("Log", ctx.op("Add", small, ctx.number(1.0, dtype)))
    return ctx.op("Add", ctx.op("Relu", x), tail)


@lowers(aten.softplus.default)
def softplus(
    ctx: Context, node: Node, x: Arg, beta: float = 1, threshold: float = 20
) -> ir.Value:
    """log(1 + exp(βx))/β, and x where βx exceeds the threshold."""
    dtype, value = ctx.dtype(node), ctx.value(x)
    scaled = value if beta == 1 else ctx.op("Mul", value, ctx.number(float(beta), dtype))
    soft = softplus_of(ctx, scaled, dtype)
    if beta != 1:
        soft = ctx.op("Div", soft, ctx.number(float(beta), dtype))
    return ctx.op("Where", ctx.op("Greater", scaled, ctx.number(threshold, dtype)), value, soft)


@lowers(aten.mish.default)
def mish(ctx: Context, node: Node, x: Arg) -> ir.Value:
    value = ctx.value(x)
    return ctx.op("Mul", value, ctx.op("Tanh", softplus_of(ctx, value, ctx.dtype(node))))


@lowers(aten.log_sigmoid.default)
def log_sigmoid(ctx: Context, node: Node, x: Arg) -> ir.Value:
    return ctx.op("Neg", softplus_of(ctx, ctx.op("Neg", ctx.value(x)), ctx.dtype(node)))


@lowers(aten._prelu_kernel.default, aten.prelu.default)
def prelu(ctx: Context, node: Node, x: Node, slope: Node) -> ir.Value:
    value, factor = ctx.value(x), ctx.value(slope)
    if ctx.rank(slope) == 1 and ctx.rank(x) > 2:  # one slope per channel
        factor = ctx.op("Unsqueeze", factor, ctx.ints(range(1, ctx.rank(x) - 1)))
    return ctx.op("PRelu", value, factor)


@lowers(aten.glu.default)
def glu(ctx: Context, node: Node, x: Node, dim: int = -1) -> ir.Value:
    left, right = ctx.builder.op("Split", ctx.value(x), axis=dim, num_outputs=2, outputs=2)
    return ctx.op("Mul", left, ctx.op("Sigmoid", right))


@lowers(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(
    ctx: Context, node: Node, x: Node, dim: int, dtype: torch.dtype | bool | None = None
) -> ir.Value:
    value = ctx.value(x, ctx.dtype(node))
    if node.target is aten._safe_softmax.default:
        return safe_softmax(ctx, value, dim, ctx.dtype(node))
    if _looks_masked(x):
        value = floored(ctx, value, dim, ctx.dtype(node))[0]
    return ctx.op("Softmax", value, axis=dim)


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(
    ctx: Context, node: Node, x: Node, dim: int, dtype: torch.dtype | bool | None = None
) -> ir.Value:
    return ctx.op("LogSoftmax", ctx.value(x, ctx.dtype(node)), axis=dim)


def floored(
    ctx: Context, x: ir.Value, dim: int, dtype: torch.dtype
) -> tuple[ir.Value, ir.Value]:
    """``max(x, rowmax − 64)``, and the row maxima. Leaves softmax as it is, and much faster.

    onnxruntime's exp runs into subnormal numbers on masked scores (11 times slower, measured). The
    floor changes a probability by at most e^−64 = 1.6e−28.
    """
    largest = ctx.op("ReduceMax", x, ctx.ints([dim]), keepdims=1)
    floor = ctx.op("Sub", largest, ctx.number(SOFTMAX_FLOOR, dtype))
    return ctx.op("Max", x, floor), largest


def safe_softmax(ctx: Context, x: ir.Value, dim: int, dtype: torch.dtype) -> ir.Value:
    """Softmax in which a row of −∞ gives zeros."""
    value, largest = floored(ctx, x, dim, dtype)
    dead = ctx.op("Equal", largest, ctx.number(-float("inf"), dtype))
    zero = ctx.number(0.0, dtype)
    return ctx.op("Where", dead, zero, ctx.op("Softmax", value, axis=dim))


_SAME_VALUES = (aten._to_copy.default, aten.view.default, aten.clone.default, aten.cat.default,
                aten.sub.Tensor)  # fmt: skip
_MASKING = (aten.add.Tensor, aten.where.self, aten.masked_fill.Scalar)


def _looks_masked(x: Node) -> bool:
    """Whether scores come from an operator that masks: an added mask, a selection."""
    while x.target in _SAME_VALUES and isinstance(x.args[0], (Node, list, tuple)):
        source = x.args[0]
        source = source if isinstance(source, Node) else source[0]
        if not isinstance(source, Node):
            return False
        x = source
    return x.target in _MASKING
