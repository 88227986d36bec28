"""Normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.context import Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.backends.onnxruntime.shapes import Dim
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten


def _or_constant(ctx: Context, arg: Node | None, shape: Sequence[int], fill: float, like: Node
                 ) -> ir.Value:  # fmt: skip
    """An affine parameter, or the neutral one."""
    if arg is not None:
        return ctx.value(arg, ctx.dtype(like))
    dtype = ctx.dtype(like)
    key = ("filled", tuple(shape), fill, dtype)
    if key not in ctx.memo:
        ctx.memo[key] = ctx.weight(torch.full(tuple(shape), fill, dtype=dtype), "neutral")
    return ctx.memo[key]


@lowers(aten.layer_norm.default)
def layer_norm(
    ctx: Context, node: Node, x: Node, shape: Sequence[int], weight: Node | None = None,
    bias: Node | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> ir.Value:  # fmt: skip
    return ctx.op("LayerNormalization", ctx.value(x), _or_constant(ctx, weight, shape, 1.0, x),
                  None if bias is None else ctx.value(bias, ctx.dtype(x)), axis=-len(shape),
                  epsilon=eps)


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    ctx: Context, node: Node, x: Node, shape: Sequence[int], weight: Node | None,
    bias: Node | None, eps: float,
) -> tuple[ir.Value, ...]:  # fmt: skip
    return ctx.builder.op(
        "LayerNormalization", ctx.value(x), _or_constant(ctx, weight, shape, 1.0, x),
        None if bias is None else ctx.value(bias, ctx.dtype(x)), axis=-len(shape), epsilon=eps,
        outputs=3)


@lowers(aten.rms_norm.default)
def rms_norm(
    ctx: Context, node: Node, x: Node, shape: Sequence[int], weight: Node | None = None,
    eps: float | None = None,
) -> ir.Value:  # fmt: skip
    dtype = ctx.dtype(x)
    return ctx.op("RMSNormalization", ctx.value(x), _or_constant(ctx, weight, shape, 1.0, x),
                  axis=-len(shape), epsilon=torch.finfo(dtype).eps if eps is None else eps)


@lowers(aten.group_norm.default)
def group_norm(
    ctx: Context, node: Node, x: Node, groups: int, weight: Node | None = None,
    bias: Node | None = None, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> ir.Value:  # fmt: skip
    """Each group as one channel of an ``InstanceNormalization``, then the affine part."""
    dtype, sizes, channels = ctx.dtype(x), ctx.sizes(x), ctx.meta(x).shape[1]
    if not isinstance(channels, int):
        raise LoweringError(f"{describe(node)}: the number of channels is not fixed; "
                            f"remedy: fix that dimension in dynamic_shapes")
    ones = _or_constant(ctx, None, [groups], 1.0, x)
    zeros = _or_constant(ctx, None, [groups], 0.0, x)
    apart = ctx.op("Reshape", ctx.value(x), ctx.ints([0, groups, -1]))
    normal = ctx.op("InstanceNormalization", apart, ones, zeros, epsilon=eps)
    grouped: list[Dim] = [sizes[0], groups, -1]
    result = ctx.reshape(normal, grouped, sizes)
    axes = ctx.ints(range(1, ctx.rank(x) - 1))
    for op_type, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            column = ctx.op("Unsqueeze", ctx.value(parameter, dtype), axes)
            result = ctx.op(op_type, result, column)
    return result


@lowers(aten.instance_norm.default)
def instance_norm(
    ctx: Context, node: Node, x: Node, weight: Node | None, bias: Node | None, mean: Node | None,
    variance: Node | None, use_input_stats: bool, momentum: float, eps: float, cudnn: bool,
) -> ir.Value:  # fmt: skip
    if not use_input_stats:
        if mean is None or variance is None:
            raise LoweringError(f"{describe(node)}: neither statistics nor inputs to take them of")
        return _batch_norm(ctx, x, weight, bias, mean, variance, eps)
    channels = [ctx.meta(x).shape[1]]
    gain = _or_constant(ctx, weight, channels, 1.0, x)
    shift = _or_constant(ctx, bias, channels, 0.0, x)
    return ctx.op("InstanceNormalization", ctx.value(x), gain, shift, epsilon=eps)


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(
    ctx: Context, node: Node, x: Node, weight: Node | None, bias: Node | None, mean: Node,
    variance: Node, momentum: float, eps: float,
) -> list[Any]:  # fmt: skip
    """Only the result: in inference nobody reads the two empty statistics."""
    return [_batch_norm(ctx, x, weight, bias, mean, variance, eps), None, None]


@lowers(aten.batch_norm.default)
def batch_norm(
    ctx: Context, node: Node, x: Node, weight: Node | None, bias: Node | None, mean: Node,
    variance: Node, training: bool, momentum: float, eps: float, cudnn: bool,
) -> ir.Value:  # fmt: skip
    if training:
        raise LoweringError(f"{describe(node)}: batch statistics; remedy: call model.eval()")
    return _batch_norm(ctx, x, weight, bias, mean, variance, eps)


def _batch_norm(
    ctx: Context, x: Node, weight: Node | None, bias: Node | None, mean: Node, variance: Node,
    eps: float,
) -> ir.Value:  # fmt: skip
    channels = list(ctx.meta(mean).shape)
    return ctx.op("BatchNormalization", ctx.value(x), _or_constant(ctx, weight, channels, 1.0, x),
                  _or_constant(ctx, bias, channels, 0.0, x), *ctx.values((mean, variance)),
                  epsilon=eps)
