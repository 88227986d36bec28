"""Movement: channels go where elements go."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scaleprop.rules.base import rule_for
from scaleprop.rules.channels.base import DIAGONAL, EVERY, LINEAR, Flow, channels, only
from scaleprop.rules.channels.layouts import (
    UNTOUCHED,
    Layout,
    Refused,
    put,
    relabelled,
    reshaped,
    sizes_of,
    taken,
)

aten: Any = torch.ops.aten


@channels(aten.clone.default, aten.alias.default, aten.detach.default,
          aten.lift_fresh_copy.default, aten._to_copy.default)  # fmt: skip
def same(flow: Flow) -> None:
    """Every element stays where it is."""
    value: Any = flow.node.meta["val"]
    if not value.is_floating_point():
        raise Refused("what is read becomes no float")
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(layout)
    if flow.out is not None:
        flow.carry(flow.node.args[0], flow.out, 0)


@channels(aten.permute.default, aten.transpose.int)
def permuted(flow: Flow) -> None:
    """Axes change places."""
    rule = rule_for(flow.node.target)
    assert rule is not None and rule.axes is not None
    sources = rule.axes(flow.node)  # output axis → input axis
    if (layout := flow.of(flow.node.args[0])) is not None:
        places = {source: axis for axis, source in enumerate(sources) if source is not None}
        flow.result(relabelled(layout, places))
    if flow.out is not None:
        back = {axis: source for axis, source in enumerate(sources) if source is not None}
        flow.carry(flow.node.args[0], relabelled(flow.out, back), 0)


@channels(aten.view.default, aten._unsafe_view.default, aten.reshape.default,
          aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim,
          aten.squeeze.default)  # fmt: skip
def viewed(flow: Flow) -> None:
    """Axes are split and joined in row-major order."""
    before, after = sizes_of(flow.node.args[0]), sizes_of(flow.node)
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(reshaped(layout, before, after))
    if flow.out is not None:
        flow.carry(flow.node.args[0], reshaped(flow.out, after, before), 0)


@channels(aten.t.default)
def turned(flow: Flow) -> None:
    """The two axes of a matrix change places."""
    rank = len(sizes_of(flow.node))
    swap = {axis: rank - 1 - axis for axis in range(rank)}
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(relabelled(layout, swap))
    if flow.out is not None:
        flow.carry(flow.node.args[0], relabelled(flow.out, swap), 0)


@channels(aten.expand.default)
def expanded(flow: Flow) -> None:
    """Repeats axes of size 1: what is repeated is one channel."""
    before, after = sizes_of(flow.node.args[0]), sizes_of(flow.node)
    lead = len(after) - len(before)
    if (layout := flow.of(flow.node.args[0])) is not None:
        axes = tuple(axis + lead for axis in layout.axes)
        flow.result(Layout(axes, np.broadcast_to(layout.codes, [after[axis] for axis in axes])))
    if flow.out is not None:
        _carry_back(flow, flow.out, before, after)


def _carry_back(flow: Flow, layout: Layout, before: Any, after: Any) -> None:
    """Every repetition must carry what the original does: one after the other is carried."""
    lead = len(after) - len(before)
    repeated = [axis for axis in layout.axes
                if axis < lead or before[axis - lead] != after[axis]]  # fmt: skip
    if not repeated:
        flow.carry(flow.node.args[0], layout.at([axis - lead for axis in layout.axes]), 0)
        return
    places = [layout.axes.index(axis) for axis in repeated]
    kept = [axis - lead for axis in layout.axes if axis not in repeated]
    codes = np.moveaxis(layout.codes, places, range(len(places)))
    for copy in codes.reshape(-1, *codes.shape[len(places):]):
        if kept:
            flow.carry(flow.node.args[0], Layout(tuple(kept), copy), 0)
        elif int(copy) != UNTOUCHED:
            raise Refused("a single value is repeated over the channels")


def _cut(flow: Flow, axis: int, index: Any) -> None:
    """The output is ``index`` of ``axis`` of operand 0."""
    size = sizes_of(flow.node.args[0])[axis]
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(taken(layout, axis, index))
    if flow.out is not None:
        flow.carry(flow.node.args[0], put(flow.out, axis, index, size), 0)


def _touches(flow: Flow, axis: int) -> bool:
    layouts = (flow.of(flow.node.args[0]), flow.out)
    return any(layout is not None and axis in layout.axes for layout in layouts)


@channels(aten.slice.Tensor)
def sliced(flow: Flow) -> None:
    """aten.slice(x, dim, start, end, step)."""
    args: Any = flow.node.args
    axis = (args[1] if len(args) > 1 else 0) % len(sizes_of(args[0]))
    bounds = args[2:]
    if _touches(flow, axis) and any(isinstance(bound, torch.fx.Node) for bound in bounds):
        raise Refused("the bounds of a slice of channels are computed")
    index = slice(*bounds) if bounds and _touches(flow, axis) else slice(None)
    _cut(flow, axis, index)


@channels(aten.select.int)
def selected(flow: Flow) -> None:
    """aten.select(x, dim, index): an axis goes."""
    args: Any = flow.node.args
    sizes = sizes_of(args[0])
    axis = args[1] % len(sizes)
    others = [place for place in range(len(sizes)) if place != axis]
    if (layout := flow.of(args[0])) is not None:
        if layout.axes == (axis,):
            raise Refused("one channel is picked out")
        left = Layout(layout.axes, layout.codes)
        if axis in layout.axes:
            place = layout.axes.index(axis)
            left = Layout(tuple(a for a in layout.axes if a != axis),
                          layout.codes.take(args[2], place))  # fmt: skip
        flow.result(relabelled(left, {old: new for new, old in enumerate(others)}))
    if flow.out is not None:
        back = flow.out.at([others[place] for place in flow.out.axes])
        source = flow.of(args[0])
        if source is not None and axis in source.axes:
            axes = tuple(sorted((*back.axes, axis)))
            codes = np.expand_dims(back.codes, axes.index(axis))
            back = put(Layout(axes, codes), axis, slice(args[2], args[2] + 1 or None), sizes[axis])
        flow.carry(args[0], back, 0)


@channels(aten.split.Tensor, aten.split_with_sizes.default, parts=True)
def split(flow: Flow) -> None:
    """One of the consecutive pieces of an axis."""
    source: Any = flow.node.args[0]
    place: Any = flow.node.args[1]
    x, sizes, *rest = source.args
    shape = sizes_of(x)
    axis: int = (rest[0] if rest else source.kwargs.get("dim", 0)) % len(shape)
    lengths = sizes if isinstance(sizes, (list, tuple)) else [sizes] * (place + 1)
    if any(isinstance(length, torch.fx.Node) for length in lengths):
        index = slice(None)
        if any(known is not None and axis in known.axes for known in (flow.of(x), flow.out)):
            raise Refused("the sizes of the pieces are computed")
    else:
        begin = sum(lengths[:place])
        index = slice(begin, begin + lengths[place])
    if (layout := flow.of(x)) is not None:
        flow.result(taken(layout, axis, index))
    if flow.out is not None:
        flow.carry(x, put(flow.out, axis, index, shape[axis]), 0)


@channels(aten.unbind.int, parts=True)
def unbound(flow: Flow) -> None:
    """One of the slices of an axis; the axis goes."""
    source: Any = flow.node.args[0]
    place: Any = flow.node.args[1]
    x = source.args[0]
    sizes = sizes_of(x)
    axis: int = (source.args[1] if len(source.args) > 1 else 0) % len(sizes)
    others = [other for other in range(len(sizes)) if other != axis]
    if (layout := flow.of(x)) is not None:
        piece = taken(layout, axis, place)
        if axis in layout.axes:
            piece = Layout(tuple(a for a in layout.axes if a != axis), piece.codes)
        if not piece.axes:
            raise Refused("one channel is picked out")
        flow.result(relabelled(piece, {old: new for new, old in enumerate(others)}))
    if flow.out is not None:
        back = flow.out.at([others[a] for a in flow.out.axes])
        axes = tuple(sorted((*back.axes, axis)))
        codes = np.expand_dims(back.codes, axes.index(axis))
        flow.carry(x, put(Layout(axes, codes), axis, slice(place, place + 1), sizes[axis]), 0)


@channels(aten.cat.default)
def joined(flow: Flow) -> None:
    """aten.cat(parts, dim): along channels each part has its own; along others all share."""
    parts: Any = flow.node.args[0]
    out = sizes_of(flow.node)
    given: Any = flow.node.args[1] if len(flow.node.args) > 1 else 0
    axis = given % len(out)
    begin = 0
    for place, part in enumerate(parts):
        if part.meta["val"].ndim != len(out):
            continue  # an empty vector, which cat skips
        length = sizes_of(part)[axis]
        index = slice(begin, begin + length)
        begin += length
        layout = flow.of(part)
        if layout is not None:
            flow.result(put(layout, axis, index, out[axis]))
        if flow.out is not None:
            flow.carry(part, taken(flow.out, axis, index), (0, place))


@channels(aten.stack.default)
def stacked(flow: Flow) -> None:
    """aten.stack(parts, dim): a new axis; all parts carry the same."""
    parts: Any = flow.node.args[0]
    rank = len(sizes_of(flow.node))
    given: Any = flow.node.args[1] if len(flow.node.args) > 1 else 0
    new = given % rank
    others = [axis for axis in range(rank) if axis != new]
    for place, part in enumerate(parts):
        if (layout := flow.of(part)) is not None:
            axes = tuple(sorted((*(others[a] for a in layout.axes), new)))
            codes = np.expand_dims(layout.codes, axes.index(new))
            index = slice(place, place + 1)
            flow.result(put(Layout(axes, codes), new, index, len(parts)))
        if flow.out is not None:
            piece = taken(flow.out, new, place)
            axes = tuple(a for a in flow.out.axes if a != new)
            if axes:
                carried = Layout(axes, piece.codes)
                flow.carry(part, relabelled(carried, {o: i for i, o in enumerate(others)}),
                           (0, place))  # fmt: skip
            else:
                raise Refused("one channel each is stacked")


@channels(aten.index.Tensor)
def indexed(flow: Flow) -> None:
    """aten.index(x, [None, i, j, …]): rows are picked, whose channels lie along other axes."""
    x: Any = flow.node.args[0]
    indices: Any = flow.node.args[1]
    places = [place for place, index in enumerate(indices) if index is not None]
    if any(indices[place].meta["val"].dtype == torch.bool for place in places):
        raise Refused("rows are picked by a mask")
    adjacent = places == list(range(places[0], places[0] + len(places)))
    rank = max(indices[place].meta["val"].ndim for place in places)
    start = places[0] if adjacent else 0
    left = [axis for axis in range(len(sizes_of(x))) if axis not in places]
    new = {axis: place if place < start else place + rank for place, axis in enumerate(left)}
    if (layout := flow.of(x)) is not None:
        flow.result(relabelled(layout, new))
    if flow.out is not None:
        flow.carry(x, relabelled(flow.out, {after: before for before, after in new.items()}), 0)


@channels(aten.index_select.default)
def rows_selected(flow: Flow) -> None:
    """aten.index_select(x, dim, index)."""
    axis: Any = flow.node.args[1]
    _along_others(flow, axis % len(sizes_of(flow.node)), "channels are picked by a computed index")


@channels(aten.roll.default, aten.flip.default)
def rolled(flow: Flow) -> None:
    """aten.roll(x, shifts, dims), aten.flip(x, dims): along axes without channels."""
    args: Any = flow.node.args
    dims = args[2] if len(args) > 2 else (args[1] if flow.node.target is aten.flip.default else [])
    rank = len(sizes_of(flow.node))
    for axis in [dim % rank for dim in dims] or range(rank):
        if _touches(flow, axis):
            raise Refused("channels are rolled or flipped")
    _along_others(flow, rank, "")


@channels(aten.cumsum.default)
def summed_up(flow: Flow) -> None:
    """aten.cumsum(x, dim): linear along another axis."""
    only(flow, LINEAR, "a shift would be summed up")
    axis: Any = flow.node.args[1]
    _along_others(flow, axis % len(sizes_of(flow.node)), "channels are summed up")


def _along_others(flow: Flow, axis: int, why: str) -> None:
    """Operand 0 and the output carry the same, and nothing along ``axis``."""
    if _touches(flow, axis):
        raise Refused(why)
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(layout)
    if flow.out is not None:
        flow.carry(flow.node.args[0], flow.out, 0)


@channels(aten.repeat.default)
def tiled(flow: Flow) -> None:
    """aten.repeat(x, times): every repetition carries what the original does."""
    times: Any = flow.node.args[1]
    before, after = sizes_of(flow.node.args[0]), sizes_of(flow.node)
    lead = len(after) - len(before)
    if (layout := flow.of(flow.node.args[0])) is not None:
        counts = [times[axis + lead] for axis in layout.axes]
        if any(isinstance(count, torch.fx.Node) for count in counts):
            raise Refused("channels are repeated a computed number of times")
        flow.result(Layout(tuple(axis + lead for axis in layout.axes),
                           np.tile(layout.codes, counts)))  # fmt: skip
    if flow.out is None:
        return
    axes = [axis for axis in flow.out.axes if axis >= lead]
    if len(axes) != len(flow.out.axes):
        raise Refused("whole copies are told apart")
    copies = [flow.out]
    for axis in axes:
        size = before[axis - lead]
        copies = [taken(copy, axis, slice(begin, begin + size))
                  for copy in copies for begin in range(0, after[axis], size)]  # fmt: skip
    for copy in copies:
        flow.carry(flow.node.args[0], copy.at([axis - lead for axis in copy.axes]), 0)


@channels(aten.constant_pad_nd.default)
def padded(flow: Flow) -> None:
    """aten.constant_pad_nd(x, pad, value): zeros stay zero under every linear transform."""
    args: Any = flow.node.args
    value = args[2] if len(args) > 2 else flow.node.kwargs.get("value", 0)
    pads = {len(sizes_of(args[0])) - 1 - place // 2: (args[1][place], args[1][place + 1])
            for place in range(0, len(args[1]), 2)}  # fmt: skip
    moving = {axis: pad for axis, pad in pads.items() if pad != (0, 0)}
    if moving:
        only(flow, LINEAR if value == 0 else ("permute",), "padding does not follow the values")
    layout, out = flow.of(args[0]), flow.out
    for axis, (front, back) in moving.items():
        if not _touches(flow, axis):
            continue
        if any(isinstance(n, torch.fx.Node) or n < 0 for n in (front, back)):
            raise Refused("channels are padded by a computed number, or cut")
        size = sizes_of(flow.node)[axis]
        index = slice(front, size - back)
        layout = None if layout is None else put(layout, axis, index, size)
        out = None if out is None else taken(out, axis, index)
    if layout is not None:
        flow.result(layout)
    if out is not None:
        flow.carry(args[0], out, 0)


@channels(aten.full.default, aten.zeros.default, aten.full_like.default, aten.zeros_like.default,
          aten.new_zeros.default, aten.scalar_tensor.default, aten.empty_permuted.default,
          aten.empty.memory_format)  # fmt: skip
def constant(flow: Flow) -> None:
    """Zeros are their own transform; so is every constant, permuted."""
    args: Any = flow.node.args
    if flow.node.target is aten.scalar_tensor.default:
        value = args[0]
    else:
        value = args[1] if "full" in str(flow.node.target) else 0
    if flow.kind != "permute" and value != 0:
        raise Refused(f"it is the constant {value}")
    only(flow, [kind for kind in EVERY if kind != "shift"], "it is zero, which a shift changes")


def _is_repeated(index: Any, dim: int) -> bool:
    """Whether an index is the same along all axes but ``dim``."""
    if index.target is not aten.expand.default:
        return False
    before, after = sizes_of(index.args[0]), sizes_of(index)
    return len(before) == len(after) and all(
        size == 1 for axis, size in enumerate(before) if axis != dim)


@channels(aten.index_add.default, aten.index_put.default, aten.scatter_add.default)
def added_to_rows(flow: Flow) -> None:
    """index_add(x, dim, i, y), index_put(x, [i, …], y, accumulate): rows are added to others."""
    args: Any = flow.node.args
    only(flow, LINEAR, "a shift would be added up")
    first = flow.node.target is aten.index_put.default
    source = args[2] if first else args[3]
    rank = len(sizes_of(flow.node))
    rows = {place for place, index in enumerate(args[1]) if index is not None} if first else {
        args[1] % rank}  # fmt: skip
    shapes = sizes_of(source)
    if len(shapes) != rank:
        raise Refused("what is added has other axes")
    if flow.node.target is aten.scatter_add.default and not _is_repeated(args[2], args[1] % rank):
        only(flow, DIAGONAL, "each channel has rows of its own")
    for value, slot in ((args[0], 0), (source, 2 if first else 3)):
        if (layout := flow.of(value)) is not None:
            if rows & set(layout.axes):
                raise Refused("channels are picked by a computed index")
            flow.result(layout)
        if flow.out is not None:
            if rows & set(flow.out.axes):
                raise Refused("channels are picked by a computed index")
            flow.carry(value, flow.out, slot)
