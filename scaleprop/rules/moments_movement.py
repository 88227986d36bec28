"""Moments of what is moved, put together, made from constants, or drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from scaleprop import ops
from scaleprop.rules.moments import (
    ZERO,
    Answer,
    Call,
    Moments,
    added,
    among_zeros,
    averaged,
    by_rows,
    mixed,
    moments_rule,
    product,
    summed,
)

aten: Any = torch.ops.aten


@moments_rule(
    aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten._unsafe_index.Tensor,
    aten.index_select.default, aten.gather.default, aten.repeat.default, aten.as_strided.default,
    aten.diagonal.default, aten.unfold.default, aten.im2col.default, aten.reflection_pad2d.default,
    aten.replication_pad2d.default, aten.upsample_nearest2d.vec, aten.embedding.default, ops.cast,
)  # fmt: skip
def passed(call: Call) -> Answer:
    """Elements of argument 0, as if picked at random."""
    return call.first()


@moments_rule(aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int)
def parted(call: Call) -> Answer:
    """Each part is like the whole."""
    return (call.first(),) * len(call.node.meta["val"])


@moments_rule(aten.sort.default)
def ordered(call: Call) -> Answer:
    """Values and places."""
    return call.first(), None


@moments_rule(aten.topk.default)
def topmost(call: Call) -> Answer:
    """The k largest of each row."""
    x, k, largest = call.first(), call["k"], call["largest"]
    size = call.shape("self")[call["dim"]]
    found = by_rows(x, size, lambda rows: rows.topk(min(k, rows.shape[1]), largest=largest).values)
    return found, None


@moments_rule(aten.copy.default, aten.copy_.default)
def replaced(call: Call) -> Answer:
    """copy(self, src) is src."""
    return call.of("src")


@moments_rule(aten.cat.default, aten.stack.default)
def joined(call: Call) -> Answer:
    """Parts weigh by their number of elements."""
    parts: Sequence[Any] = call["tensors"]
    return mixed([(call.numel(part), call.of(part)) for part in parts])


@moments_rule(aten.constant_pad_nd.default)
def padded(call: Call) -> Answer:
    """The rest is ``value``."""
    inside, total = call.numel("self"), call.numel()
    return mixed([(inside, call.of("self")), (total - inside, Moments.constant(call["value"]))])


@moments_rule(aten.tril.default, aten.triu.default)
def triangular(call: Call) -> Answer:
    """Zeros on one side of a diagonal."""
    ones = torch.ones(call.shape()[-2:], dtype=torch.float32)
    kept = call.node.target(ones, call["diagonal"])  # type: ignore[operator]
    return among_zeros(call.first(), float(kept.mean()))


@moments_rule(
    aten.slice_scatter.default, aten.select_scatter.default, aten.as_strided_scatter.default
)
def inserted(call: Call) -> Answer:
    """src in the place of as many elements of self."""
    part = call.numel("src")
    return mixed([(call.numel() - part, call.of(call.node.args[0])), (part, call.of("src"))])


@moments_rule(aten.index_put.default, aten._unsafe_index_put.default)
def put(call: Call) -> Answer:
    """values at indices, no two alike; or added there."""
    base, values = call.of("self"), call.of("values")
    share = _places(call) / call.numel()
    if call["accumulate"]:
        return added(base, summed(values, share))
    share = min(share, 1.0)
    return mixed([(1 - share, base), (share, values)])


def _places(call: Call) -> int:
    """How many elements an index_put writes. A mask as index is taken to be half set."""
    size = call.shape("self")
    chosen = 1
    shapes: list[tuple[int, ...]] = []
    for axis, index in enumerate(call["indices"]):
        if index is None:
            chosen *= size[axis]
        elif index.meta["val"].dtype is torch.bool:
            chosen *= math.prod(call.shape(index)) // 2
        else:
            shapes.append(call.shape(index))
    chosen *= math.prod(size[len(call["indices"]):])
    return chosen * math.prod(torch.broadcast_shapes(*shapes)) if shapes else chosen


@moments_rule(aten.scatter.src, aten.scatter.value)
def scattered(call: Call) -> Answer:
    """src, or a number, at as many places as there are indices."""
    share = min(call.numel("index") / call.numel(), 1.0)
    source = call.of("src" if "src" in call.arguments else "value")
    return mixed([(1 - share, call.of("self")), (share, source)])


@moments_rule(aten.scatter_add.default, aten.index_add.default)
def scattered_sum(call: Call) -> Answer:
    """Each place gets src/self of them."""
    name = "src" if "src" in call.arguments else "source"
    base, source = call.of("self"), call.of(name)
    sums = summed(source, call.numel(name) / call.numel())
    return added(base, sums.times(call.arguments.get("alpha", 1)))


@moments_rule(
    aten.slice_backward.default, aten.select_backward.default, aten.diagonal_backward.default,
    aten.unfold_backward.default, aten.col2im.default, aten.reflection_pad2d_backward.default,
    aten.replication_pad2d_backward.default, aten.upsample_nearest2d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
)  # fmt: skip
def put_back(call: Call) -> Answer:
    """What was read many times gets a sum; what was not read, 0."""
    gradient = call.first()
    return summed(gradient, call.numel(call.node.args[0]) / call.numel())


@moments_rule(aten.embedding_dense_backward.default)
def looked_up(call: Call) -> Answer:
    """Rows get sums of as many gradients as they were looked up, a Poisson number."""
    dy, n = call.first(), call.numel("indices") / call["num_weights"]
    return Moments(dy.mean * n, math.sqrt(n * dy.rms**2 + (n * dy.mean) ** 2),
                          zeros=math.exp(-n * (1 - dy.zeros)), nonnegative=dy.nonnegative)


@moments_rule(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default)
def spread(call: Call) -> Answer:
    """Each gradient goes, divided by k, to the k elements that were averaged."""
    dy = call.first()
    ratio = call.numel() / call.numel("grad_output")
    k = math.prod(_pair(call["kernel_size"])) if "kernel_size" in call.arguments else ratio
    return summed(dy, k / ratio).times(1 / k)


def _pair(size: Sequence[int] | int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * 2 if len(sizes) == 1 else sizes


@moments_rule(aten.avg_pool2d.default)
def pooled_mean(call: Call) -> Answer:
    """Means of k elements."""
    x = call.first()
    return averaged(x, math.prod(_pair(call["kernel_size"])))


@moments_rule(aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool2d.default)
def pooled_to_size(call: Call) -> Answer:
    """Means of input / output elements."""
    x = call.first()
    return averaged(x, call.numel(call.node.args[0]) / call.numel())


@moments_rule(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def pooled_maximum(call: Call) -> Answer:
    """The largest of k elements; ±∞ pads."""
    x = call.first()
    k = math.prod(_pair(call["kernel_size"]))
    found = by_rows(x, k, lambda rows: rows.amax(-1))
    several = isinstance(call.node.meta["val"], tuple | list)
    return (found, None) if several else found


@moments_rule(aten.upsample_bilinear2d.vec)
def interpolated(call: Call) -> Answer:
    """Σ of neighbours, with weights that depend on sizes alone: taken from the operator."""
    x = call.first()
    size = call.shape()[-2:]
    return _linear(x, call.shape("input")[-2:], lambda image: aten.upsample_bilinear2d.vec(
        image, size, call["align_corners"], None))


@moments_rule(aten.upsample_bilinear2d_backward.default)
def interpolated_back(call: Call) -> Answer:
    """The transpose of the same sums."""
    dy = call.first()
    small = call["input_size"][-2:]
    return _linear(
        dy, call.shape("grad_output")[-2:],
        lambda image: aten.upsample_bilinear2d_backward.default(
            image, call["output_size"], [len(image), 1, *small], call["align_corners"]))


def _linear(x: Moments, size: Sequence[int], function: Any) -> Moments:
    """Of a linear map of an image: its gain for noise, and for a constant."""
    maker = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 8, *size, generator=maker, dtype=torch.float64)
    noise = noise / noise.square().mean().sqrt()
    gain = function(noise.reshape(8, 1, *size)).square().mean().item()
    level = function(torch.ones(1, 1, *size, dtype=torch.float64))
    mean = x.mean * level.mean().item()
    square = x.variance * gain + x.mean**2 * level.square().mean().item()
    return Moments(mean, math.sqrt(square), nonnegative=x.nonnegative)


# -- made from constants


@moments_rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def filled(call: Call) -> Answer:
    """One number."""
    return _number(call, call["fill_value"])


@moments_rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(call: Call) -> Answer:
    """Zeros."""
    return ZERO


@moments_rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(call: Call) -> Answer:
    """Ones."""
    return Moments.constant(1.0)


@moments_rule(aten.scalar_tensor.default)
def number(call: Call) -> Answer:
    """One number."""
    return _number(call, call["s"])


def _number(call: Call, value: Any) -> Moments | None:
    is_number = isinstance(value, int | float)
    return Moments.constant(float(value), call.node.meta["val"].dtype) if is_number else None


@moments_rule(
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default
)
def evaluated(call: Call) -> Answer:
    """Few numbers, all known: measured."""
    if any(isinstance(given, torch.fx.Node) for given in call.node.args):
        return None
    made = call.node.target(*call.node.args, **{**call.node.kwargs, "device": "cpu"})  # type: ignore[operator]
    return Moments.measured(made) if made.is_floating_point() else None


@moments_rule(aten.rand.default, aten.rand_like.default)
def uniform(call: Call) -> Answer:
    """Uniform in [0, 1)."""
    return Moments(0.5, math.sqrt(1 / 3), nonnegative=True)


@moments_rule(aten.randn.default, aten.randn_like.default)
def normal(call: Call) -> Answer:
    """Standard normal."""
    return Moments(0.0, 1.0)


# -- dropout


@moments_rule(aten.native_dropout.default)
def dropped(call: Call) -> Answer:
    """A share p becomes 0, the rest is divided by 1 − p; and the mask."""
    x, keep = call.of("input"), 1 - call["p"] if call["train"] is not False else 1.0
    return _thinned(x, keep), Moments.of_mask(keep)


@moments_rule(aten.dropout.default)
def dropped_alone(call: Call) -> Answer:
    """The same without the mask."""
    return _thinned(call.of("input"), 1 - call["p"] if call["train"] else 1.0)


def _thinned(x: Moments, keep: float) -> Moments:
    return among_zeros(x.times(1 / keep), keep) if keep > 0 else ZERO


@moments_rule(aten.native_dropout_backward.default)
def dropped_back(call: Call) -> Answer:
    """dy·mask·scale."""
    return product(call.of("grad_output"), call.of("mask")).times(call["scale"])
