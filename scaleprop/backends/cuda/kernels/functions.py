"""Functions inside kernels, float32 to float32, within a few units in the last place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By its series below 1/4, where 1 − 2/(1 + e²ˣ) would cancel."""
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    decay = tl.exp(tl.abs(x) * -2.0)
    size = tl.div_rn(1.0 - decay, 1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -size, size))
