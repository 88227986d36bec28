"""Reading and writing by index; sorting and counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.promotion import computable
from scaleprop.backends.onnxruntime.aten.views import broadcast, transposed
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.backends.onnxruntime.shapes import Dim
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten
_INDEX_TYPES = (torch.int32, torch.int64)


def _index(ctx: Context, node: Node) -> ir.Value:
    dtype = ctx.dtype(node)
    return ctx.value(node, dtype if dtype in _INDEX_TYPES else torch.int64)


@lowers(aten.embedding.default)
def embedding(
    ctx: Context, node: Node, weight: Node, indices: Node, *_training_options: Any
) -> ir.Value:
    return ctx.op("Gather", ctx.value(weight), _index(ctx, indices), axis=0)


@lowers(aten.index_select.default)
def index_select(ctx: Context, node: Node, x: Node, dim: int, index: Node) -> ir.Value:
    return ctx.op("Gather", ctx.value(x), _index(ctx, index), axis=dim % ctx.rank(x))


@lowers(aten.gather.default)
def gather(
    ctx: Context, node: Node, x: Node, dim: int, index: Node, *, sparse_grad: bool = False
) -> ir.Value:
    return ctx.op("GatherElements", ctx.value(x), _index(ctx, index), axis=dim % ctx.rank(x))


@lowers(aten.index.Tensor)
def index(ctx: Context, node: Node, x: Node, indices: Sequence[Node | None]) -> ir.Value:
    given = _positions(ctx, node, indices)
    value = ctx.value(x)
    if len(given) == 1:
        return ctx.op("Gather", value, _index(ctx, indices[given[0]]), axis=given[0])  # pyright: ignore[reportArgumentType]
    rank = ctx.rank(x)
    rest = [axis for axis in range(rank) if axis not in given]
    found = ctx.op("GatherND", transposed(ctx, value, [*given, *rest]),
                   _stacked(ctx, [indices[axis] for axis in given]))
    # the index axes are in front now; torch leaves them in place where they are neighbours
    count = ctx.rank(node) - len(rest)
    start = given[0] if given[-1] - given[0] == len(given) - 1 else 0
    order = [*range(count, count + start), *range(count), *range(count + start, ctx.rank(node))]
    return transposed(ctx, found, order)


def _positions(ctx: Context, node: Node, indices: Sequence[Node | None]) -> list[int]:
    given = [axis for axis, entry in enumerate(indices) if entry is not None]
    for axis in given:
        if ctx.dtype(indices[axis]) in (torch.bool, torch.uint8):  # pyright: ignore[reportArgumentType]
            raise LoweringError(
                f"{describe(node)}: selection by a boolean mask has a size that depends on the "
                f"data; remedy: use torch.where, or integer indices")
    return given


def _stacked(ctx: Context, indices: Sequence[Any]) -> ir.Value:
    """Index tensors broadcast to one shape, side by side along a new last axis."""
    rank = max(ctx.rank(entry) for entry in indices)
    shape = broadcast_sizes(ctx, indices)
    whole = [ctx.value(entry, torch.int64) for entry in indices]
    if not all(ctx.rank(entry) == rank and ctx.sizes(entry) == shape for entry in indices):
        whole = [broadcast(ctx, value, shape, torch.int64) for value in whole]
    last = ctx.ints([rank])
    return ctx.op("Concat", *[ctx.op("Unsqueeze", value, last) for value in whole], axis=rank)


def broadcast_sizes(ctx: Context, nodes: Sequence[Node]) -> list[Dim]:
    """The shape to which tensors broadcast."""
    rank = max(ctx.rank(node) for node in nodes)
    sizes: list[Dim] = [1] * rank
    for node in nodes:
        for axis, size in enumerate(ctx.sizes(node), start=rank - ctx.rank(node)):
            if size != 1:
                sizes[axis] = size
    return sizes


@lowers(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    ctx: Context, node: Node, x: Node, indices: Sequence[Node | None], values: Node,
    accumulate: bool = False,
) -> ir.Value:  # fmt: skip
    given = [axis for axis, entry in enumerate(indices) if entry is not None]
    first = indices[given[0]] if len(given) == 1 else None
    if first is not None and ctx.dtype(first) is torch.bool and ctx.rank(values) == 0:
        return _masked_put(ctx, node, x, first, given[0], values, accumulate)
    _positions(ctx, node, indices)
    dtype = ctx.dtype(x)
    rest = [axis for axis in range(ctx.rank(x)) if axis not in given]
    order = [*given, *rest]
    entries = [entry for entry in indices if entry is not None]
    lead = broadcast_sizes(ctx, entries)
    shape: list[Dim] = [*lead, *[ctx.size(x, axis) for axis in rest]]
    if given != list(range(given[0], given[0] + len(given))) and given[0] != 0:
        raise LoweringError(f"{describe(node)}: indices around a full axis; "
                            f"remedy: move the indexed axes together")
    updates = ctx.value(values, dtype)
    if rest and given[0] > 0 and ctx.rank(values) > 0:
        raise LoweringError(f"{describe(node)}: writes behind a full leading axis; "
                            f"remedy: transpose the indexed axes to the front")
    if ctx.sizes(values) != shape:
        updates = broadcast(ctx, updates, shape, dtype)
    written = ctx.op("ScatterND", transposed(ctx, ctx.value(x), order), _stacked(ctx, entries),
                     updates, reduction="add" if accumulate else "none")
    return transposed(ctx, written, [order.index(axis) for axis in range(len(order))])


def _masked_put(
    ctx: Context, node: Node, x: Node, mask: Node, axis: int, values: Node, accumulate: bool
) -> ir.Value:
    """One value wherever a mask over some neighbouring axes is true."""
    from scaleprop.backends.onnxruntime.aten.logic import select

    dtype = ctx.dtype(x)
    behind = ctx.rank(x) - axis - ctx.rank(mask)
    condition = ctx.value(mask)
    if behind:
        axes = range(ctx.rank(mask), ctx.rank(mask) + behind)
        condition = ctx.op("Unsqueeze", condition, ctx.ints(axes))
    new, old = ctx.value(values, dtype), ctx.value(x)
    return select(ctx, condition, ctx.op("Add", old, new) if accumulate else new, old, dtype)


@lowers(aten.scatter.src)
def scatter(ctx: Context, node: Node, x: Node, dim: int, index: Node, src: Node) -> ir.Value:
    return _scatter(ctx, x, dim, index, ctx.value(src))


@lowers(aten.scatter_add.default)
def scatter_add(ctx: Context, node: Node, x: Node, dim: int, index: Node, src: Node) -> ir.Value:
    return _scatter(ctx, x, dim, index, ctx.value(src), reduction="add")


@lowers(aten.scatter.value)
def scatter_value(ctx: Context, node: Node, x: Node, dim: int, index: Node, value: Arg
                  ) -> ir.Value:  # fmt: skip
    dtype = ctx.dtype(x)
    return _scatter(ctx, x, dim, index,
                    broadcast(ctx, ctx.value(value, dtype), ctx.sizes(index), dtype))


def _scatter(ctx: Context, x: Node, dim: int, index: Node, source: ir.Value,
             reduction: str = "none") -> ir.Value:  # fmt: skip
    return ctx.op("ScatterElements", ctx.value(x), _index(ctx, index), source,
                  axis=dim % max(ctx.rank(x), 1), reduction=reduction)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    ctx: Context, node: Node, x: Node, src: Node, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> ir.Value:  # fmt: skip
    """``x`` with a slice replaced: the positions of the slice index a ``ScatterND``."""
    axis = dim % ctx.rank(x)
    first: Dim = 0 if start is None else ctx.dim(start)
    last: Dim = ctx.size(x, axis) if end is None or end == torch.iinfo(torch.int64).max \
        else ctx.dim(end)  # fmt: skip
    length = ctx.size(x, axis)
    if isinstance(length, int) and isinstance(first, int) and isinstance(last, int):
        rows = ctx.weight(torch.arange(length)[first:last:step].unsqueeze(-1), "rows")
    else:
        everything = ctx.op("Range", ctx.number(0, torch.int64), _scalar(ctx, length),
                            ctx.number(1, torch.int64))
        rows = ctx.op("Slice", everything, ctx.shape_vector([first]), ctx.shape_vector([last]),
                      ctx.ints([0]), ctx.ints([step]))
        rows = ctx.op("Unsqueeze", rows, ctx.ints([1]))
    order = [axis, *[a for a in range(ctx.rank(x)) if a != axis]]
    written = ctx.op("ScatterND", transposed(ctx, ctx.value(x), order), rows,
                     transposed(ctx, ctx.value(src), order))
    return transposed(ctx, written, [order.index(a) for a in range(len(order))])


def _scalar(ctx: Context, size: Dim) -> ir.Value:
    return ctx.op("Squeeze", ctx.shape_vector([size]), ctx.ints([0]))


@lowers(aten.topk.default)
def topk(
    ctx: Context, node: Node, x: Node, k: Any, dim: int = -1, largest: bool = True,
    ordered: bool = True,
) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    return _top(ctx, x, ctx.dim(k), dim, largest)


@lowers(aten.sort.default)
def sort(ctx: Context, node: Node, x: Node, dim: int = -1, descending: bool = False
         ) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    return _top(ctx, x, ctx.size(x, dim), dim, descending)


@lowers(aten.sort.stable)
def sort_stable(
    ctx: Context, node: Node, x: Node, *, stable: bool | None, dim: int = -1,
    descending: bool = False,
) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    """``TopK`` keeps equal elements in their order, which is what stable means."""
    return _top(ctx, x, ctx.size(x, dim), dim, descending)


@lowers(aten.argsort.default)
def argsort(ctx: Context, node: Node, x: Node, dim: int = -1, descending: bool = False
            ) -> ir.Value:  # fmt: skip
    return _top(ctx, x, ctx.size(x, dim), dim, descending)[1]


def _top(ctx: Context, x: Node, k: Dim, dim: int, largest: bool) -> tuple[ir.Value, ir.Value]:
    dtype = ctx.dtype(x)
    wide = computable(dtype)
    values, places = ctx.builder.op(
        "TopK", ctx.value(x, wide), ctx.shape_vector([k]), axis=dim % ctx.rank(x),
        largest=int(largest), sorted=1, outputs=2)
    return ctx.cast(values, wide, dtype), places


@lowers(aten.histc.default)
def histc(ctx: Context, node: Node, x: Node, bins: int = 100, low: Arg = 0, high: Arg = 0
          ) -> ir.Value:  # fmt: skip
    """Counts in equal bins of [low, high]; the upper end belongs to the last bin."""
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low >= high:
        raise LoweringError(f"{describe(node)}: needs a fixed range; remedy: pass min and max")
    value = ctx.op("Reshape", ctx.value(x, torch.float32), ctx.ints([-1, 1]))
    lower, upper = ctx.number(float(low), torch.float32), ctx.number(float(high), torch.float32)
    steps = ctx.op("Mul", ctx.op("Sub", value, lower),
                   ctx.number(bins / (high - low), torch.float32))
    place = ctx.op("Min", ctx.op("Floor", steps), ctx.number(float(bins - 1), torch.float32))
    inside = ctx.op("And", ctx.op("GreaterOrEqual", value, lower),
                    ctx.op("LessOrEqual", value, upper))
    each = ctx.weight(torch.arange(bins, dtype=torch.float32), "bins")
    hit = ctx.op("And", ctx.op("Equal", place, each), inside)
    count = ctx.op("ReduceSum", ctx.cast(hit, torch.bool, torch.float32), ctx.ints([0]), keepdims=0)
    return ctx.cast(count, torch.float32, ctx.dtype(node))


@lowers(aten.one_hot.default)
def one_hot(ctx: Context, node: Node, x: Node, classes: int = -1) -> ir.Value:
    if classes < 0:
        raise LoweringError(f"{describe(node)}: the number of classes depends on the data; "
                            f"remedy: pass num_classes")
    levels = ctx.weight(torch.tensor([0, 1]), "off_on")
    return ctx.op("OneHot", ctx.value(x), ctx.number(classes, torch.int64), levels, axis=-1)
