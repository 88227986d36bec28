"""Moments of sums of products, reductions, and of their gradients.

A sum of n products of independent factors has mean n·m₀·m₁ and rms² = n·r₀²·r₁² + n(n−1)·m₀²·m₁²:
means that are not 0 add up faster than what scatters about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from scaleprop import ops
from scaleprop.rules.moments import (
    Answer,
    Call,
    Moments,
    added,
    averaged,
    by_rows,
    drawn,
    moments_rule,
    product,
    summed,
)

aten: Any = torch.ops.aten


@moments_rule(aten.linear.default)
def linear(call: Call) -> Answer:
    """Σ_k x[…, k]·w[n, k] + b[n]."""
    return _biased(call, "input", "weight", "bias", call.shape("weight")[-1])


@moments_rule(aten.mm.default, aten.bmm.default, aten.matmul.default)
def multiplied(call: Call) -> Answer:
    """Σ_k x[…, k]·y[k, …]."""
    left, right = call.node.args[:2]
    return product(call.of(left), call.of(right), call.shape(left)[-1])


@moments_rule(aten.addmm.default, aten.baddbmm.default)
def multiplied_and_added(call: Call) -> Answer:
    """β·b + α·Σ_k x[…, k]·y[k, …]."""
    left, right = call.node.args[1:3]
    b, x, y = call.of("self"), call.of(left), call.of(right)
    return added(b.times(call["beta"]), product(x, y, call.shape(left)[-1]).times(call["alpha"]))


@moments_rule(ops.gemm)
def low_precision(call: Call) -> Answer:
    """α·Σ_k x[…, k]·y[k, …]."""
    left, right, alpha, *_ = call.node.args
    x, y = call.of(left), call.of(right)
    if not isinstance(alpha, int | float):
        return None
    return product(x, y, call.shape(left)[-1]).times(alpha)


# -- quantized operands have the moments of what they stand for: their first part does


@moments_rule(ops.quantize, ops.fake_quantize)
def rounded(call: Call) -> Answer:
    """What it was, but for rounding."""
    return call.of("x")


@moments_rule(ops.dequantize)
def restored(call: Call) -> Answer:
    """What the parts stand for."""
    return call.of(_first(call["parts"]))


@moments_rule(ops.scaled_mm)
def scaled(call: Call) -> Answer:
    """Σ_k x̂[…, k]·ŵ[n, k] + b[n]."""
    x, w, k = call.of(_first(call["x"])), call.of(_first(call["w"])), call["k"]
    if not isinstance(k, int):
        return None
    result = product(x, w, k)
    return result if call["bias"] is None else added(result, call.of("bias"))


@moments_rule(ops.hadamard)
def rotated(call: Call) -> Answer:
    """An orthogonal map keeps the size; the mean goes into one of a block's elements."""
    return Moments(0.0, call.of("x").rms)


def _first(parts: Any) -> Any:
    """The first of an operand's parts, or the one node that makes them all."""
    return parts[0] if isinstance(parts, tuple | list) else parts


def _biased(call: Call, x: str, w: str, b: str, n: float) -> Moments:
    result = product(call.of(x), call.of(w), n)
    return result if call[b] is None else added(result, call.of(b))


# -- convolutions: every result is a sum over its share of all multiplications


@moments_rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default
)
def convolution(call: Call) -> Answer:
    """Padding adds nothing, so sums at the border are shorter."""
    return _biased(call, "input", "weight", "bias",
                   _multiplications(call, call.shape()) / call.numel())


@moments_rule(aten.convolution_backward.default)
def convolution_back(call: Call) -> Answer:
    """dx from dy and w, dw from dy and x, db from dy."""
    dy, x, w = call.of("grad_output"), call.maybe("input"), call.maybe("weight")
    total = _multiplications(call, call.shape("grad_output"))
    sides = call.shape("grad_output")
    return (
        w and product(dy, w, total / call.numel("input")),
        x and product(dy, x, total / call.numel("weight")),
        summed(dy, math.prod(sides) / sides[1]),
    )


def _multiplications(call: Call, output: Sequence[int]) -> int:
    """How many products of an element and a weight a convolution adds up."""
    size, weight = call.shape("input"), call.shape("weight")
    rank = len(weight) - 2
    stride, padding, dilation = (_each(call[name], rank)
                                 for name in ("stride", "padding", "dilation"))
    transposed = call.arguments.get("transposed", False)
    # a transposed convolution's input is placed as the other's output
    wide, narrow = (output, size) if transposed else (size, output)
    taps = 1
    for axis in range(rank):
        places = torch.arange(narrow[axis + 2])[:, None] * stride[axis] - padding[axis]
        places = places + torch.arange(weight[axis + 2]) * dilation[axis]
        taps *= int(((places >= 0) & (places < wide[axis + 2])).sum())
    return size[0] * weight[0] * weight[1] * taps


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


# -- reductions


def _count(call: Call) -> float:
    """How many elements make one of the output's."""
    return call.numel(call.node.args[0]) / max(call.numel(), 1)


@moments_rule(aten.sum.dim_IntList, aten.sum.default)
def total(call: Call) -> Answer:
    """Σ x."""
    x = call.first()
    return summed(x, _count(call) * (1 - x.masked))


@moments_rule(aten.mean.dim, aten.mean.default)
def mean(call: Call) -> Answer:
    """Σ x / n."""
    x = call.first()
    return averaged(x, _count(call))


@moments_rule(aten.var.correction)
def variance(call: Call) -> Answer:
    """σ², ± σ²·√(2/(n − 1)) for normal x."""
    x = call.first()
    return _variance(x, _count(call))


@moments_rule(aten.var_mean.correction)
def variance_and_mean(call: Call) -> Answer:
    """Both."""
    x, n = call.first(), _count(call)
    return _variance(x, n), averaged(x, n)


@moments_rule(aten.std.correction)
def deviation(call: Call) -> Answer:
    """The root of the variance."""
    x = call.first()
    n = max(_count(call), 2.0)
    return Moments(math.sqrt(x.variance * (1 - 1 / (2 * (n - 1)))), math.sqrt(x.variance),
                   nonnegative=True)


def _variance(x: Moments, n: float) -> Moments:
    return Moments(x.variance, x.variance * math.sqrt(1 + 2 / max(n - 1, 1)), nonnegative=True)


@moments_rule(aten.linalg_vector_norm.default)
def length(call: Call) -> Answer:
    """(Σ |x|^p)^(1/p), evaluated on random rows."""
    x, order = call.of("self"), float(call["ord"])
    n = _count(call)
    if order == 2 and n > 8192:  # rows that long are not drawn
        return Moments.constant(x.rms * math.sqrt(n))
    return by_rows(x, round(n), lambda rows: torch.linalg.vector_norm(rows, order, -1))


@moments_rule(aten.amax.default)
def largest(call: Call) -> Moments | None:
    """The largest of n."""
    x = call.first()
    return by_rows(x, round(_count(call)), lambda rows: rows.amax(-1))


@moments_rule(aten.amin.default)
def smallest(call: Call) -> Moments | None:
    """The smallest of n."""
    x = call.first()
    return by_rows(x, round(_count(call)), lambda rows: rows.amin(-1))


@moments_rule(aten.max.dim)
def largest_and_place(call: Call) -> Answer:
    """The largest of n, and where it is."""
    return largest(call), None


@moments_rule(aten.min.dim)
def smallest_and_place(call: Call) -> Answer:
    """The smallest of n, and where it is."""
    return smallest(call), None


@moments_rule(aten.cumsum.default)
def running_sum(call: Call) -> Answer:
    """Σ of the first k, averaged over k = 1 … n."""
    x = call.first()
    shape = call.shape()
    n = shape[call["dim"]] if shape else 1
    square = x.variance * (n + 1) / 2 + x.mean**2 * (n + 1) * (2 * n + 1) / 6
    return Moments(x.mean * (n + 1) / 2, math.sqrt(square), nonnegative=x.nonnegative)


@moments_rule(aten.any.default, aten.any.dim)
def some(call: Call) -> Answer:
    """A mask of n places is set somewhere."""
    x = call.first()
    return Moments.of_mask(1 - x.zeros ** _count(call))


@moments_rule(aten.all.default, aten.all.dim)
def every(call: Call) -> Answer:
    """A mask of n places is set everywhere."""
    x = call.first()
    return Moments.of_mask((1 - x.zeros) ** _count(call))


# -- gates of two halves


@moments_rule(aten.glu.default)
def gated(call: Call) -> Answer:
    """a·sigmoid(b), of the halves of x."""
    x = call.first()
    return by_rows(x, 4096, lambda rows: aten.glu(rows, -1))


@moments_rule(aten.glu_backward.default)
def gated_back(call: Call) -> Answer:
    """dy·sigmoid(b) for one half, dy·a·sigmoid'(b) for the other."""
    dy, x = call.first(), call.of("self")
    rows = drawn(x, 8, 4096)
    slope = aten.glu_backward(torch.ones(8, 2048, dtype=rows.dtype), rows, -1)
    found = Moments.measured(slope)
    return found and product(dy, found)


@moments_rule(aten.log_sigmoid_forward.default)
def log_sigmoid(call: Call) -> Answer:
    """log sigmoid(x), and a buffer."""
    x = call.first()
    return by_rows(x, 4096, torch.nn.functional.logsigmoid), None


@moments_rule(aten.log_sigmoid_backward.default)
def log_sigmoid_back(call: Call) -> Answer:
    """dy·sigmoid(−x)."""
    dy, x = call.first(), call.of("self")
    slope = by_rows(x, 4096, lambda rows: torch.sigmoid(-rows))
    return slope and product(dy, slope)
