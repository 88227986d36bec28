"""Norms and activations that are quantized where they are computed.

    x, up [M, K] float32, bfloat16 or float16, any strides; gain, bias [K]
    y = x/√(mean x² + ε)·gain + bias, (x − mean x)/√(var x + ε)·gain + bias, f(x) or f(x)·up
    data [M, bytes of K], scales of groups [M, ⌈K/C⌉], rows [M] or one, zero points as many

y is float32, in registers only; rounded as a narrower dtype would hold it where a program says so.
Of a norm rows are read again, from the cache: for their mean, their variance, the range of y, y.
What needs the tensor's range first, scales of two levels or of the tensor, takes two launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.functions import activated, rounded
from scaleprop.backends.cuda.kernels.groups import coded, store_scales
from scaleprop.backends.cuda.kernels.numbers import as_float, magnitude, one_level, tensor_factors
from scaleprop.backends.cuda.kernels.rows import affine, load_tile, ordered, row_codes
from scaleprop.backends.cuda.kernels.storing import store_codes


@triton.jit
def _moments(x, first_row, M, K, row_stride, column_stride, EPS: tl.constexpr, NORM: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean (0 for 1, "rms") and 1/√(mean (x − that)² + ε) of rows."""
    mean = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32) + K
    if NORM == 2:
        added = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, K, COLUMNS):
            added += load_tile(x, first_row, start, M, K, row_stride, column_stride, ROWS, COLUMNS)
        mean = tl.div_rn(tl.sum(added, 1), count)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        values = load_tile(x, first_row, start, M, K, row_stride, column_stride, ROWS, COLUMNS)
        if NORM == 2:
            inside = (start + tl.arange(0, COLUMNS) < K)[None, :]
            values = tl.where(inside, values - mean[:, None], 0.0)
        squares += values * values
    root = tl.sqrt_rn(tl.div_rn(tl.sum(squares, 1), count) + EPS)
    return mean, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), root)


@triton.jit
def _computed(
    x, up, gain, bias, mean, factor, first_row, first_column, M, K, row_stride, column_stride,
    up_row_stride, up_column_stride, NORM: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, BETWEEN: tl.constexpr,
    WITHIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [ROWS, COLUMNS]; 0 outside."""
    y = load_tile(x, first_row, first_column, M, K, row_stride, column_stride, ROWS, COLUMNS)
    column = first_column + tl.arange(0, COLUMNS)
    if NORM > 0:
        if NORM == 2:
            y -= mean[:, None]
        y = rounded(y * factor[:, None], WITHIN)
        if GAIN:
            y *= tl.load(gain + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            y += tl.load(bias + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    else:
        y = activated(y, FUNCTION)
        if GATED:
            y = rounded(y, WITHIN) * load_tile(up, first_row, first_column, M, K, up_row_stride,
                                               up_column_stride, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    return tl.where((row < M)[:, None] & (column < K)[None, :], rounded(y, BETWEEN), 0.0)


@triton.jit
def fused_kernel(
    x, up, gain, bias, ranges, data, scales, zeros, whole, result, M, K, span,
    row_stride, column_stride, up_row_stride, up_column_stride, width, scale_width,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, MODE: tl.constexpr,
    NORM: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, GAIN: tl.constexpr,
    BIAS: tl.constexpr, EPS: tl.constexpr, BETWEEN: tl.constexpr, WITHIN: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of ``span`` columns. MODE: 0 only adds to ``ranges`` (int32 [3], begins as 0);
    1 groups of C columns; 2 rows, all of whose columns are in the span; 3 the tensor's ranges.

    WITHIN: what is rounded before gain, bias or ``up``. KEEP: y goes to ``result``, too.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, K)
    rows = first_row + tl.arange(0, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    factor = tl.zeros((ROWS,), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    encoding = 1.0
    decoding = 1.0
    if NORM > 0:
        mean, factor = _moments(x, first_row, M, K, row_stride, column_stride, EPS, NORM, ROWS,
                                COLUMNS)
    if MODE == 0 or MODE == 2:
        most = tl.zeros((ROWS, COLUMNS), tl.int32)
        low = tl.zeros((ROWS, COLUMNS), tl.int32)
        high = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(first, last, COLUMNS):
            y = _computed(x, up, gain, bias, mean, factor, first_row, start, M, K, row_stride,
                          column_stride, up_row_stride, up_column_stride, NORM, FUNCTION, GATED,
                          GAIN, BIAS, BETWEEN, WITHIN, ROWS, COLUMNS)
            most = tl.maximum(most, magnitude(y))
            if LEVELS > 0:
                low = tl.minimum(low, ordered(y))
                high = tl.maximum(high, ordered(y))
        row_most = tl.max(most, 1)
        row_low = tl.min(low, 1)
        row_high = tl.max(high, 1)
        if MODE == 0:
            tl.atomic_max(ranges, tl.max(row_most, 0))
            if LEVELS > 0:
                tl.atomic_min(ranges + 1, tl.min(row_low, 0))
                tl.atomic_max(ranges + 2, tl.max(row_high, 0))
    if MODE == 3:
        row_most = tl.zeros((ROWS,), tl.int32) + tl.load(ranges)
        row_low = tl.zeros((ROWS,), tl.int32) + tl.load(ranges + 1)
        row_high = tl.zeros((ROWS,), tl.int32) + tl.load(ranges + 2)
    if MODE >= 2:
        kept = rows < M if MODE == 2 else rows == 0
        if LEVELS > 0:
            scale, zero = affine(row_most, row_low, row_high, LEVELS, S[6])
            tl.store(zeros + rows, zero.to(tl.uint8), mask=kept)
        else:
            scale = one_level(as_float(row_most), S)
        tl.store(scales + rows, scale, mask=kept)
    if MODE == 1 and S[1]:
        outer, encoding, decoding = tensor_factors(as_float(tl.load(ranges)), S)
        tl.store(whole, outer, mask=(first_row == 0) & (first == 0))
    if MODE > 0:
        for start in range(first, last, COLUMNS):
            y = _computed(x, up, gain, bias, mean, factor, first_row, start, M, K, row_stride,
                          column_stride, up_row_stride, up_column_stride, NORM, FUNCTION, GATED,
                          GAIN, BIAS, BETWEEN, WITHIN, ROWS, COLUMNS)
            column = start + tl.arange(0, COLUMNS)
            if KEEP:
                tl.store(result + rows[:, None] * K + column[None, :], y,
                         mask=(rows < M)[:, None] & (column < K)[None, :])
            if MODE == 1:
                codes, scale = coded(y, 0, encoding, decoding, E, S, 1, C, 0, 0)
                store_scales(scale, scales, first_row, start // C, M, scale_width, S)
            else:
                codes = row_codes(y, scale, zero, E, LEVELS)
                if LEVELS > 0:  # 0 is not the code of what fills the last byte
                    codes = tl.where((column < K)[None, :], codes, 0)
            store_codes(codes, data, first_row, start, M, width, E[1])
