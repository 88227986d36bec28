"""Norms, softmax, and what sums or compares along other axes than channels."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.rules.channels.base import (
    DIAGONAL,
    EVERY,
    LINEAR,
    Flow,
    channels,
    only,
)
from scaleprop.rules.channels.layouts import Layout, Refused, relabelled, sizes_of

aten: Any = torch.ops.aten


def _given(flow: Flow, place: int) -> Any:
    return flow.node.args[place] if len(flow.node.args) > place else None


@channels(aten.rms_norm.default)
def rms_norm(flow: Flow) -> None:
    """x / rms(x) · w."""
    _norm(flow, weight=2, bias=None)


@channels(aten.layer_norm.default)
def layer_norm(flow: Flow) -> None:
    """(x − mean(x)) / std(x) · w + b."""
    _norm(flow, weight=2, bias=3)


def _norm(flow: Flow, weight: int, bias: int | None) -> None:
    """weight and bias are along the normalised axes, which come last."""
    node = flow.node
    rank = len(sizes_of(node))
    normalised: Any = node.args[1]
    lead = rank - len(normalised)
    layout, out = flow.of(node.args[0]), flow.out
    for known in (layout, out):
        if known is not None and any(axis < lead for axis in known.axes):
            raise Refused("channels lie along its rows")
    if flow.kind == "permute":
        for known in (layout, out):
            if known is not None:
                _permute_norm(flow, known, lead, weight, bias)
        return
    if layout is not None:
        if flow.kind == "rotate":
            _rotate_norm(flow, layout, weight, bias)
        elif flow.kind != "centre" or bias is None or _is_partial(layout, normalised):
            # a layer_norm subtracts the mean itself
            raise Refused("a norm weighs its inputs against each other")
    if out is None:
        return
    if flow.kind in DIAGONAL:
        inner = _inner(node, out, lead)
        flow.carry(_given(flow, weight), inner, weight, missing=1.0)
        if bias is not None and _given(flow, bias) is not None:
            flow.carry(_given(flow, bias), inner, bias)
    elif flow.kind == "shift":
        if bias is None:
            raise Refused("an RMS norm has no bias to take a shift")
        inner = _inner(node, out, lead)
        flow.carry(_given(flow, bias), inner, bias, missing=0.0)
    elif flow.kind == "rotate":
        _rotate_norm(flow, out, weight, bias)
    else:
        raise Refused("a norm's output has no mean to take")


def _inner(node: torch.fx.Node, layout: Layout, lead: int) -> Layout:
    """The layout of a weight, as large as all that is normalised."""
    sizes = sizes_of(node)
    axes = tuple(range(lead, len(sizes)))
    return Layout(tuple(axis - lead for axis in axes), layout.on(axes, sizes))


def _is_partial(layout: Layout, normalised: Any) -> bool:
    """Whether some of what is normalised is left as it is."""
    whole = 1
    for size in normalised:
        whole *= size
    return layout.codes.size != whole or bool((layout.codes < 0).any())


def _rotate_norm(flow: Flow, layout: Layout, weight: int, bias: int | None) -> None:
    """|x·Q| = |x|: a rotation passes an RMS norm that has no gain."""
    if bias is not None:
        raise Refused("a layer_norm subtracts the mean, which a rotation moves; centre first")
    if _given(flow, weight) is not None:
        raise Refused("a gain per channel stands between; fold it into what follows first")
    flow.carry(flow.node.args[0], layout, 0)
    flow.result(layout)


def _permute_norm(flow: Flow, layout: Layout, lead: int, weight: int, bias: int | None) -> None:
    flow.carry(flow.node.args[0], layout, 0)
    flow.result(layout)
    inner = layout.at([axis - lead for axis in layout.axes])
    for place in (weight, bias):
        if place is not None and _given(flow, place) is not None:
            flow.carry(_given(flow, place), inner, place)


@channels(aten._native_batch_norm_legit_no_training.default, parts=True)
def batch_norm(flow: Flow) -> None:
    """(x − mean)/√(var + ε)·w + b per channel: mean takes a scale of x, and w its inverse."""
    norm: Any = flow.node.args[0]
    if flow.node.args[1] != 0:
        raise Refused("only the normalised values carry channels")
    x, w, bias, mean, variance = norm.args[:5]
    layout, out = flow.of(x), flow.out
    for known in (layout, out):
        if known is not None and known.axes != (1,):
            raise Refused("channels lie along its pixels")
    if flow.kind == "permute":
        for known in (layout, out):
            if known is not None:
                flow.carry(x, known, 0)
                flow.result(known)
                for slot, value in ((1, w), (2, bias), (3, mean), (4, variance)):
                    if value is not None:
                        flow.carry(value, known.at([0]), slot)
        return
    only(flow, (*DIAGONAL, "shift"), "each channel is normalised for itself")
    if layout is not None:
        flow.carry(mean, layout.at([0]), 3)
        if flow.kind != "shift":
            flow.carry(w, layout.inverse().at([0]), 1, missing=1.0, side=1)
    if out is not None:
        if flow.kind != "shift":
            flow.carry(w, out.at([0]), 1, missing=1.0)
        if bias is not None or flow.kind == "shift":
            flow.carry(bias, out.at([0]), 2, missing=0.0)


@channels(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(flow: Flow) -> None:
    """e^x / Σ e^x: only a permutation passes."""
    only(flow, ("permute",), "a softmax is not homogeneous")
    if (layout := flow.of(flow.node.args[0])) is not None:
        flow.result(layout)
    if flow.out is not None:
        flow.carry(flow.node.args[0], flow.out, 0)


def _along_others(flow: Flow, dims: Any, keeps: bool) -> None:
    """A reduction of axes ``dims`` that hold no channels."""
    x: Any = flow.node.args[0]
    rank = len(sizes_of(x))
    gone = {dim % rank for dim in dims} if dims else set(range(rank))
    left = [axis for axis in range(rank) if keeps or axis not in gone]
    new = {axis: place for place, axis in enumerate(left)}
    if (layout := flow.of(x)) is not None:
        if gone & set(layout.axes):
            raise Refused("channels are reduced to one")
        flow.result(relabelled(layout, new))
    if flow.out is not None:
        back = relabelled(flow.out, {after: before for before, after in new.items()})
        if gone & set(back.axes):
            raise Refused("channels are reduced to one")
        flow.carry(x, back, 0)


def _reduction(flow: Flow) -> tuple[Any, bool]:
    args, kwargs = flow.node.args, flow.node.kwargs
    dims: Any = args[1] if len(args) > 1 else kwargs.get("dim")
    keeps: Any = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return ([dims] if isinstance(dims, int) else dims), bool(keeps)


@channels(aten.sum.dim_IntList)
def total(flow: Flow) -> None:
    """Σ over other axes is linear."""
    only(flow, LINEAR, "a shift would be summed up")
    _along_others(flow, *_reduction(flow))


@channels(aten.mean.dim)
def mean(flow: Flow) -> None:
    """A mean over other axes lets everything pass."""
    _along_others(flow, *_reduction(flow))


@channels(aten.amax.default, aten.amin.default)
def largest(flow: Flow) -> None:
    """Largest over other axes: d·max(x) = max(d·x) for d > 0."""
    only(flow, ("scale", "permute", "shift"), "the largest of several is no sum")
    _along_others(flow, *_reduction(flow))


@channels(aten.max_pool2d.default, aten.max_pool1d.default, aten.max_pool3d.default,
          aten.adaptive_max_pool2d.default)  # fmt: skip
def max_pooled(flow: Flow) -> None:
    """The largest of neighbours, channel by channel."""
    only(flow, ("scale", "permute", "shift"), "the largest of several is no sum")
    _per_channel(flow)


@channels(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default,
          aten.adaptive_avg_pool3d.default)  # fmt: skip
def mean_pooled(flow: Flow) -> None:
    """The mean of neighbours, channel by channel."""
    only(flow, EVERY, "")
    _per_channel(flow)


@channels(aten.avg_pool2d.default, aten.avg_pool1d.default, aten.avg_pool3d.default,
          aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
          aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default)  # fmt: skip
def resampled(flow: Flow) -> None:
    """Weighted sums of neighbours, channel by channel; padding may count as zeros."""
    only(flow, LINEAR, "padding is not shifted with the values")
    _per_channel(flow)


def _per_channel(flow: Flow) -> None:
    """Axis 1 of images in batches holds channels; those behind it are mixed."""
    x: Any = flow.node.args[0]
    name = str(flow.node.target)
    rank = next(dims + 2 for dims in (1, 2, 3) if f"{dims}d" in name)
    for known, give in ((flow.of(x), flow.result),
                        (flow.out, lambda layout: flow.carry(x, layout, 0))):  # fmt: skip
        if known is None:
            continue
        if known.axes != (1,) or len(sizes_of(x)) != rank:
            raise Refused("channels lie along its pixels, or it has no batch")
        give(known)
