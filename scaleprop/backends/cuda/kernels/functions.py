"""Functions inside kernels, float32 to float32, within a few units in the last place."""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import as_float, bfloat16_bits


@triton.jit
def tanh(x):
    """By its series below 1/4, where 1 − 2/(1 + e²ˣ) would cancel."""
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    decay = tl.exp(tl.abs(x) * -2.0)
    size = tl.div_rn(1.0 - decay, 1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -size, size))


@triton.jit
def sigmoid(x):
    """1/(1 + e⁻ˣ)."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def activated(x, NAME: tl.constexpr):
    """One of ``..fusing.ACTIVATIONS``; NaN stays."""
    tl.static_assert(NAME == "silu" or NAME == "gelu" or NAME == "gelu_tanh" or NAME == "relu"
                     or NAME == "sigmoid" or NAME == "tanh")
    if NAME == "silu":
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
    elif NAME == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif NAME == "sigmoid":
        return sigmoid(x)
    else:
        return tanh(x)


@triton.jit
def rounded(x, TO: tl.constexpr):
    """float32 rounded to float16 (1) or bfloat16 (2); as it is (0)."""
    if TO == 1:
        return x.to(tl.float16).to(tl.float32)
    elif TO == 2:
        return as_float(bfloat16_bits(x).to(tl.int32) << 16)
    else:
        return x
