"""Shape and layout: reshapes, slices, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.promotion import computable
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.backends.onnxruntime.shapes import Dim, Size
from scaleprop.backends.onnxruntime.types import onnx_type
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(ctx: Context, node: Node, x: Node, size: Sequence[Any]) -> ir.Value:
    have = ctx.sizes(x)
    known = {(dim.expression if isinstance(dim, Size) else dim): dim for dim in have}
    want: list[Dim] = []
    for wanted, meta in zip(size, ctx.meta(node).shape, strict=True):
        if isinstance(meta, int):
            want.append(meta)
        elif isinstance(wanted, int) and wanted >= 0:
            want.append(wanted)
        elif isinstance(wanted, int):  # −1: the trace knows which size it is
            expression = meta.node.expr
            want.append(known.get(expression, Size(expression, None)))
        else:
            want.append(ctx.dim(wanted))
    return ctx.reshape(ctx.value(x), have, want)


@lowers(aten.view.dtype)
def view_dtype(ctx: Context, node: Node, x: Node, dtype: torch.dtype) -> ir.Value:
    if ctx.dtype(x).itemsize != dtype.itemsize:
        raise LoweringError(f"{describe(node)}: reinterpreting {ctx.dtype(x)} as {dtype} changes "
                            f"the shape; remedy: use dtypes of one size")
    return ctx.op("BitCast", ctx.value(x), to=int(onnx_type(dtype)))


@lowers(aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
        aten.lift_fresh_copy.default, aten.dropout.default)  # fmt: skip
def same(ctx: Context, node: Node, x: Node, *_args: Any, **_options: Any) -> Any:
    """No node: values in ONNX are immutable and have no strides. (Dropout is in eval mode.)"""
    return ctx.result(x)


@lowers(aten.unsqueeze.default)
def unsqueeze(ctx: Context, node: Node, x: Node, dim: int) -> ir.Value:
    return ctx.op("Unsqueeze", ctx.value(x), ctx.ints([dim % (ctx.rank(x) + 1)]))


@lowers(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(ctx: Context, node: Node, x: Node, dims: int | Sequence[int] | None = None
            ) -> ir.Value:  # fmt: skip
    if dims is None:
        dims = range(ctx.rank(x))
    wanted = [dims] if isinstance(dims, int) else dims
    axes = sorted({dim % max(ctx.rank(x), 1) for dim in wanted})
    axes = [axis for axis in axes if ctx.rank(x) and ctx.meta(x).shape[axis] == 1]
    return ctx.op("Squeeze", ctx.value(x), ctx.ints(axes)) if axes else ctx.value(x)


@lowers(aten.permute.default)
def permute(ctx: Context, node: Node, x: Node, dims: Sequence[int]) -> ir.Value:
    return transposed(ctx, ctx.value(x), [dim % ctx.rank(x) for dim in dims])


@lowers(aten.transpose.int)
def transpose(ctx: Context, node: Node, x: Node, dim0: int, dim1: int) -> ir.Value:
    order = list(range(ctx.rank(x)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return transposed(ctx, ctx.value(x), order)


@lowers(aten.t.default)
def t(ctx: Context, node: Node, x: Node) -> ir.Value:
    return transposed(ctx, ctx.value(x), list(range(ctx.rank(x)))[::-1])


def transposed(ctx: Context, x: ir.Value, order: Sequence[int]) -> ir.Value:
    """``Transpose``; no node for the identity."""
    return x if list(order) == sorted(order) else ctx.op("Transpose", x, perm=list(order))


@lowers(aten.expand.default)
def expand(ctx: Context, node: Node, x: Node, size: Sequence[Any], implicit: bool = False
           ) -> ir.Value:  # fmt: skip
    have: list[Dim] = [*[1] * (len(size) - ctx.rank(x)), *ctx.sizes(x)]
    meta = ctx.meta(node).shape
    target: list[Dim] = []
    for wanted, before, after in zip(size, have, meta, strict=True):
        unchanged = isinstance(wanted, int) and wanted == -1
        dim = before if unchanged else (after if isinstance(after, int) else ctx.dim(wanted))
        target.append(1 if dim == before else dim)
    value = ctx.value(x)
    if all(dim == 1 for dim in target):
        lead = range(len(size) - ctx.rank(x))
        return ctx.op("Unsqueeze", value, ctx.ints(lead)) if lead else value
    return broadcast(ctx, value, target, ctx.dtype(x))


def broadcast(ctx: Context, x: ir.Value, sizes: Sequence[Dim], dtype: torch.dtype) -> ir.Value:
    """``Expand``; both shapes broadcast, so a 1 keeps the size that ``x`` has."""
    wide = computable(dtype)  # no kernel for narrow integers
    if dtype in (torch.bool, torch.uint8, torch.int8):
        wide = dtype
    expanded = ctx.op("Expand", ctx.cast(x, dtype, wide), ctx.shape_vector(sizes))
    return ctx.cast(expanded, wide, dtype)


@lowers(aten.repeat.default)
def repeat(ctx: Context, node: Node, x: Node, repeats: Sequence[Any]) -> ir.Value:
    have = ctx.sizes(x)
    lead = len(repeats) - len(have)
    value = ctx.op("Unsqueeze", ctx.value(x), ctx.ints(range(lead))) if lead else ctx.value(x)
    return ctx.op("Tile", value, ctx.shape_vector([ctx.dim(count) for count in repeats]))


@lowers(aten.slice.Tensor)
def slice_(
    ctx: Context, node: Node, x: Node, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> ir.Value:  # fmt: skip
    dim %= ctx.rank(x)
    first: Dim = 0 if start is None else ctx.dim(start)
    last: Dim = _END if end is None else ctx.dim(end)
    whole = ctx.size(x, dim)
    to_the_end = last == whole or (isinstance(last, int) and (
        last >= whole if isinstance(whole, int) else last == _END))
    if first == 0 and to_the_end and step == 1:
        return ctx.value(x)
    # a symbolic size is at its end anyway: the constant is simpler
    last = _END if to_the_end else last
    return ctx.op("Slice", ctx.value(x), ctx.shape_vector([first]), ctx.shape_vector([last]),
                  ctx.ints([dim]), ctx.ints([step]))


@lowers(aten.narrow.default)
def narrow(ctx: Context, node: Node, x: Node, dim: int, start: int, length: int) -> ir.Value:
    return slice_(ctx, node, x, dim, start, start + length)


@lowers(aten.select.int)
def select(ctx: Context, node: Node, x: Node, dim: int, index: Any) -> ir.Value:
    position = ctx.value(index) if isinstance(index, Node) else ctx.number(index, torch.int64)
    return ctx.op("Gather", ctx.value(x), position, axis=dim % ctx.rank(x))


@lowers(aten.cat.default)
def cat(ctx: Context, node: Node, tensors: Sequence[Node], dim: int = 0) -> ir.Value:
    # a 1-D tensor of no elements may be concatenated to anything, and is skipped
    parts = [x for x in tensors if not (ctx.rank(x) == 1 and ctx.meta(x).shape[0] == 0)]
    if len(parts) == 1:
        return ctx.value(parts[0], ctx.dtype(node))
    axis = dim % ctx.meta(node).dim()
    return ctx.op("Concat", *ctx.values(parts, ctx.dtype(node)), axis=axis)


@lowers(aten.stack.default)
def stack(ctx: Context, node: Node, tensors: Sequence[Node], dim: int = 0) -> ir.Value:
    axis = dim % ctx.meta(node).dim()
    parts = [ctx.op("Unsqueeze", value, ctx.ints([axis]))
             for value in ctx.values(tensors, ctx.dtype(node))]
    return ctx.op("Concat", *parts, axis=axis)


@lowers(aten.split_with_sizes.default)
def split_with_sizes(
    ctx: Context, node: Node, x: Node, sizes: Sequence[Any], dim: int = 0
) -> list[ir.Value]:
    if len(sizes) == 1:
        return [ctx.value(x)]
    lengths = ctx.shape_vector([ctx.dim(size) for size in sizes])
    return list(ctx.builder.op("Split", ctx.value(x), lengths, axis=dim % ctx.rank(x),
                               outputs=len(sizes)))


@lowers(aten.split.Tensor, aten.chunk.default)
def split(ctx: Context, node: Node, x: Node, size: Any, dim: int = 0) -> list[ir.Value]:
    axis = dim % ctx.rank(x)
    parts = [part.shape[axis] for part in ctx.meta(node)]
    if not all(isinstance(part, int) for part in parts):
        raise LoweringError(f"{describe(node)}: splits an axis of unknown size; "
                            f"remedy: fix that dimension in dynamic_shapes")
    return split_with_sizes(ctx, node, x, parts, axis)


@lowers(aten.unbind.int)
def unbind(ctx: Context, node: Node, x: Node, dim: int = 0) -> list[ir.Value]:
    axis = dim % ctx.rank(x)
    value = ctx.value(x)
    return [ctx.op("Gather", value, ctx.number(index, torch.int64), axis=axis)
            for index in range(len(ctx.meta(node)))]


@lowers(aten.flip.default)
def flip(ctx: Context, node: Node, x: Node, dims: Sequence[int]) -> ir.Value:
    axes = [dim % ctx.rank(x) for dim in dims]
    count = len(axes)
    return ctx.op("Slice", ctx.value(x), ctx.ints([-1] * count), ctx.ints([-_END] * count),
                  ctx.ints(axes), ctx.ints([-1] * count))


@lowers(aten.roll.default)
def roll(ctx: Context, node: Node, x: Node, shifts: Sequence[int], dims: Sequence[int] = ()
         ) -> ir.Value:  # fmt: skip
    value = ctx.value(x)
    if not dims:
        flat = ctx.op("Reshape", value, ctx.ints([-1]))
        return ctx.op("Reshape", _rolled(ctx, flat, shifts[0], 0), ctx.op("Shape", value))
    for shift, dim in zip(shifts, dims, strict=True):
        value = _rolled(ctx, value, shift, dim % ctx.rank(x))
    return value


def _rolled(ctx: Context, x: ir.Value, shift: int, axis: int) -> ir.Value:
    """The last ``shift`` elements go to the front."""
    cut, axes = ctx.ints([-shift]), ctx.ints([axis])
    if shift == 0:
        return x
    tail = ctx.op("Slice", x, cut, ctx.ints([_END]), axes)
    head = ctx.op("Slice", x, ctx.ints([0]), cut, axes)
    return ctx.op("Concat", tail, head, axis=axis)


@lowers(aten.constant_pad_nd.default)
def constant_pad_nd(ctx: Context, node: Node, x: Node, pad: Sequence[Any], value: Arg = 0
                    ) -> ir.Value:  # fmt: skip
    rank = ctx.rank(x)
    before: list[Dim] = [0] * rank
    after: list[Dim] = [0] * rank
    for index in range(len(pad) // 2):  # torch counts from the last axis
        before[rank - 1 - index] = ctx.dim(pad[2 * index])
        after[rank - 1 - index] = ctx.dim(pad[2 * index + 1])
    have = ctx.dtype(node)
    wide = torch.int32 if have in (torch.int16, torch.uint8) else have
    pads = ctx.shape_vector([*before, *after])
    padded = ctx.op("Pad", ctx.value(x, wide), pads, ctx.value(value, wide))
    return ctx.cast(padded, wide, have)


@lowers(aten.tril.default, aten.triu.default)
def triangle(ctx: Context, node: Node, x: Node, diagonal: Any = 0) -> ir.Value:
    dtype = ctx.dtype(x)
    wide = dtype if dtype is torch.bool else computable(dtype)
    offset = ctx.value(diagonal, torch.int64)
    upper = int(node.target is aten.triu.default)
    return ctx.cast(ctx.op("Trilu", ctx.value(x, wide), offset, upper=upper), wide, dtype)


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(ctx: Context, node: Node, x: Node, factor: int) -> ir.Value:
    return ctx.op("DepthToSpace", ctx.value(x), blocksize=factor, mode="CRD")


@lowers(aten.pixel_unshuffle.default)
def pixel_unshuffle(ctx: Context, node: Node, x: Node, factor: int) -> ir.Value:
    batch, channels, height, width = ctx.sizes(x)
    if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
        raise LoweringError(f"{describe(node)}: needs fixed image sizes; "
                            f"remedy: fix them in dynamic_shapes")
    split_: list[Dim] = [batch, channels, height // factor, factor, width // factor, factor]
    merged: list[Dim] = [batch, channels * factor**2, height // factor, width // factor]
    apart = ctx.reshape(ctx.value(x), ctx.sizes(x), split_)
    order = ctx.op("Transpose", apart, perm=[0, 1, 3, 5, 2, 4])
    return ctx.reshape(order, [batch, channels, factor, factor, height // factor, width // factor],
                       merged)


@lowers(aten.unfold.default)
def unfold(ctx: Context, node: Node, x: Node, dim: int, size: int, step: int) -> ir.Value:
    """Windows of ``size`` every ``step`` along ``dim``, as a new last axis."""
    rank = ctx.rank(x)
    axis = dim % rank
    length = ctx.size(x, axis)
    if not isinstance(length, int):
        raise LoweringError(f"{describe(node)}: windows over an axis of unknown size; "
                            f"remedy: fix that dimension in dynamic_shapes")
    starts = torch.arange(0, length - size + 1, step)
    index = starts[:, None] + torch.arange(size)
    windows = ctx.op("Gather", ctx.value(x), ctx.weight(index, "windows"), axis=axis)
    order = [a for a in range(rank + 1) if a != axis + 1]
    return transposed(ctx, windows, [*order, axis + 1])
