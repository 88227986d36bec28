"""Pooling and resizing of images and sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.reductions import reduce
from scaleprop.backends.onnxruntime.context import Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _batched(ctx: Context, x: Node, rank: int) -> tuple[ir.Value, bool]:
    """The value with a batch axis, and whether one had to be made."""
    unbatched = ctx.rank(x) == rank + 1
    value = ctx.value(x)
    return (ctx.op("Unsqueeze", value, ctx.ints([0])) if unbatched else value), unbatched


def _pool(
    ctx: Context, op_type: str, x: Node, kernel: Sequence[int], stride: Any, padding: Any,
    ceil_mode: bool, **attributes: Any,
) -> ir.Value:  # fmt: skip
    rank = len(kernel)
    value, unbatched = _batched(ctx, x, rank)
    result = ctx.op(
        op_type, value, kernel_shape=list(kernel), pads=2 * _each(padding, rank),
        strides=_each(stride, rank) if stride not in (None, [], ()) else list(kernel),
        ceil_mode=int(ceil_mode), **attributes)
    return ctx.op("Squeeze", result, ctx.ints([0])) if unbatched else result


def _register(rank: int) -> None:
    max_pool, avg_pool = getattr(aten, f"max_pool{rank}d"), getattr(aten, f"avg_pool{rank}d")

    @lowers(max_pool.default)
    def _max_pool(  # pyright: ignore[reportUnusedFunction]
        ctx: Context, node: Node, x: Node, kernel: Any, stride: Any = None, padding: Any = 0,
        dilation: Any = 1, ceil_mode: bool = False,
    ) -> ir.Value:  # fmt: skip
        return _pool(ctx, "MaxPool", x, _each(kernel, rank), stride, padding, ceil_mode,
                     dilations=_each(dilation, rank))

    @lowers(avg_pool.default)
    def _avg_pool(  # pyright: ignore[reportUnusedFunction]
        ctx: Context, node: Node, x: Node, kernel: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor: int | None = None,
    ) -> ir.Value:  # fmt: skip
        if divisor is not None:
            raise LoweringError(f"{describe(node)}: divisor_override; remedy: scale the result")
        return _pool(ctx, "AveragePool", x, _each(kernel, rank), stride, padding, ceil_mode,
                     count_include_pad=int(count_include_pad))


for _rank in (1, 2, 3):
    _register(_rank)


@lowers(aten.max_pool2d_with_indices.default)
def max_pool2d_with_indices(
    ctx: Context, node: Node, x: Node, kernel: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> list[Any]:  # fmt: skip
    if any(user.args[1] == 1 for user in node.users):
        raise LoweringError(f"{describe(node)}: the places of the maxima; remedy: use only values")
    return [_pool(ctx, "MaxPool", x, _each(kernel, 2), stride, padding, ceil_mode,
                  dilations=_each(dilation, 2)), None]


@lowers(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d.default)  # fmt: skip
def adaptive_avg_pool(ctx: Context, node: Node, x: Node, size: Sequence[int]) -> ir.Value:
    rank, count = ctx.rank(x), len(size)
    axes = list(range(rank - count, rank))
    if all(wanted == 1 for wanted in size):
        return reduce(ctx, "ReduceMean", ctx.value(x), rank, axes, True)
    result = ctx.value(x)
    for axis, wanted in zip(axes, size, strict=True):
        length = ctx.meta(x).shape[axis]
        if length == wanted:
            continue
        if not isinstance(length, int) or not isinstance(wanted, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise LoweringError(f"{describe(node)}: pools an axis of unknown size; "
                                f"remedy: fix that dimension in dynamic_shapes")
        matrix = ctx.weight(_averages(length, wanted, ctx.dtype(x)), "averages")
        if axis == rank - 1:
            result = ctx.op("MatMul", result, matrix)
        else:
            turned = ctx.op("Transpose", matrix, perm=[1, 0])
            result = ctx.op("MatMul", turned, result)
    return result


def _averages(length: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """[length, count]: column i averages from floor(i·length/count) to ceil((i+1)·length/count)."""
    index, place = torch.arange(count), torch.arange(length)[:, None]
    start, end = index * length // count, -((-(index + 1) * length) // count)
    inside = ((place >= start) & (place < end)).double()
    return (inside / inside.sum(0)).to(dtype)


def _scales(ctx: Context, node: Node, x: Node) -> ir.Value:
    """Output sizes as Resize wants them: all axes."""
    sizes = ctx.meta(node).shape
    if not all(isinstance(size, int) for size in sizes[2:]):
        raise LoweringError(f"{describe(node)}: resizes to an unknown size; "
                            f"remedy: fix the image size in dynamic_shapes")
    return ctx.shape_vector([*ctx.sizes(x)[:2], *sizes[2:]])


@lowers(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
def upsample_nearest2d(ctx: Context, node: Node, x: Node, *_sizes: Any) -> ir.Value:
    return ctx.op("Resize", ctx.value(x), None, None, _scales(ctx, node, x), mode="nearest",
                  nearest_mode="floor", coordinate_transformation_mode="asymmetric")


@lowers(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)
def upsample_bilinear2d(
    ctx: Context, node: Node, x: Node, size: Any, align_corners: bool, *_scale: Any
) -> ir.Value:
    mode = "align_corners" if align_corners else "pytorch_half_pixel"
    return ctx.op("Resize", ctx.value(x), None, None, _scales(ctx, node, x), mode="linear",
                  coordinate_transformation_mode=mode)
