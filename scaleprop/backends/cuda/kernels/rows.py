"""Quantizing by rows or as a whole: one scale a row (a token, an output channel) or a tensor.

    x [M, K] float32, bfloat16 or float16, any strides
    data [M, bytes of K codes], scales [M] or [1] float32, zero points as many, uint8

A row is read twice, the second time from the cache; a tensor's range is found by a kernel of its
own. Scales that are given are read, not found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import (
    INF,
    MAGNITUDE,
    as_bits,
    as_float,
    below,
    divided,
    encode,
    magnitude,
    nearest_integer,
    one_level,
)
from scaleprop.backends.cuda.kernels.storing import store_codes


@triton.jit
def ordered(x):
    """Integers that compare as floats do; NaN is wherever its bits are."""
    bits = as_bits(x)
    return bits ^ ((bits >> 31) & MAGNITUDE)


@triton.jit
def load_tile(x, first_row, first_column, M, K, row_stride, column_stride, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):
    """float32 [ROWS, COLUMNS]; 0 outside."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS).to(tl.int64)
    return tl.load(x + rows[:, None] * row_stride + columns[None, :] * column_stride,
                   mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _row_ranges(x, first_row, M, K, row_stride, column_stride, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):
    """Of each row: bits of the largest magnitude; least and largest value in order, 0 included."""
    most = tl.zeros((ROWS, COLUMNS), tl.int32)
    low = tl.zeros((ROWS, COLUMNS), tl.int32)
    high = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, COLUMNS):
        values = load_tile(x, first_row, start, M, K, row_stride, column_stride, ROWS, COLUMNS)
        most = tl.maximum(most, magnitude(values))
        place = ordered(values)
        low = tl.minimum(low, place)
        high = tl.maximum(high, place)
    return tl.max(most, 1), tl.min(low, 1), tl.max(high, 1)


@triton.jit
def ranges_kernel(x, out, M, K, row_stride, column_stride, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    """out: int32 [3], what ``_row_ranges`` gives, of the tensor; begins as 0."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    most, low, high = _row_ranges(x, first_row, M, K, row_stride, column_stride, ROWS, COLUMNS)
    tl.atomic_max(out, tl.max(most, 0))
    tl.atomic_min(out + 1, tl.min(low, 0))
    tl.atomic_max(out + 2, tl.max(high, 0))


@triton.jit
def affine(most, low, high, LEVELS: tl.constexpr, BOUND: tl.constexpr):
    """Scale and zero point of ranges; of one with NaN or Inf, NaN and 0."""
    first = as_float(low ^ ((low >> 31) & MAGNITUDE))
    last = as_float(high ^ ((high >> 31) & MAGNITUDE))
    span = last - first
    levels = tl.full(span.shape, LEVELS, tl.float32)
    scale = below(tl.div_rn(span, levels), BOUND)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where((most < INF) & (span < float("inf")), scale, float("nan"))
    zero = below(tl.div_rn(-first, scale), LEVELS)
    return scale, tl.where(zero == zero, nearest_integer(zero), 0.0)


@triton.jit
def row_codes(values, scale, zero, E: tl.constexpr, LEVELS: tl.constexpr):
    """Codes of values, by scales and, where LEVELS is not 0, zero points of rows."""
    units = divided(values, scale[:, None])
    if LEVELS == 0:
        return encode(units, E)
    else:
        # what is beyond the range by far is beyond it after rounding, too
        units = tl.minimum(tl.maximum(units, -2.0 * LEVELS - 1), 2.0 * LEVELS + 1)
        steps = nearest_integer(units) + zero[:, None]
        steps = tl.minimum(tl.maximum(steps, 0.0), LEVELS * 1.0)
        return tl.where(values != values, 0.0, steps).to(tl.int32)


@triton.jit
def rows_kernel(
    x, ranges, data, scales, zeros, M, K, row_stride, column_stride, width, scale_stride,
    E: tl.constexpr, S: tl.constexpr, LEVELS: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows. LEVELS: of a format with zero points, else 0. scale_stride: 0 where all rows
    share a scale."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    zero = tl.zeros((ROWS,), tl.float32)
    if MODE == 2:
        scale = tl.load(scales + rows * scale_stride, mask=rows < M, other=1.0)
        if LEVELS > 0:
            zero = tl.load(zeros + rows * scale_stride, mask=rows < M, other=0).to(tl.float32)
    else:
        if MODE == 0:
            most, low, high = _row_ranges(x, first_row, M, K, row_stride, column_stride, ROWS,
                                          COLUMNS)
        else:
            most = tl.full((ROWS,), 0, tl.int32) + tl.load(ranges)
            low = tl.full((ROWS,), 0, tl.int32) + tl.load(ranges + 1)
            high = tl.full((ROWS,), 0, tl.int32) + tl.load(ranges + 2)
        if LEVELS > 0:
            scale, zero = affine(most, low, high, LEVELS, S[6])
        else:
            scale = one_level(as_float(most), S)
        kept = rows < M if MODE == 0 else rows == 0
        tl.store(scales + rows * scale_stride, scale, mask=kept)
        if LEVELS > 0:
            tl.store(zeros + rows * scale_stride, zero.to(tl.uint8), mask=kept)
    for start in range(0, K, COLUMNS):
        values = load_tile(x, first_row, start, M, K, row_stride, column_stride, ROWS, COLUMNS)
        codes = row_codes(values, scale, zero, E, LEVELS)
        if LEVELS > 0:  # 0 is not the code of what fills the last byte
            codes = tl.where((start + tl.arange(0, COLUMNS) < K)[None, :], codes, 0)
        store_codes(codes, data, first_row, start, M, width, E[1])
