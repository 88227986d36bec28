"""Quantizing rows, columns or both of a matrix, in tiles: one scale a line, or one for all.

    x [M, K] float32, bfloat16 or float16, any strides
    along rows: data [M, bytes of K codes], scales [M]; across: data [K, bytes of M codes], scales
    [K]; or [1], the same for both

Tiles are turned in registers, so that x is read, and codes are written, in the order of memory. The
first kernel finds the ranges of lines, which no program has whole; the second one reads x again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import INF, as_float, magnitude, one_level
from scaleprop.backends.cuda.kernels.rows import load_tile, row_codes
from scaleprop.backends.cuda.kernels.storing import store_codes


@triton.jit
def line_ranges_kernel(x, most, most_t, M, K, row_stride, column_stride, ALONG: tl.constexpr,
                       ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile. most, most_t: int32 [M] and [K], bits of the largest magnitudes of rows and of
    columns, which begin as 0."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    size = magnitude(load_tile(x, first_row, first_column, M, K, row_stride, column_stride, ROWS,
                               COLUMNS))
    if ALONG:
        rows = first_row + tl.arange(0, ROWS)
        tl.atomic_max(most + rows, tl.max(size, 1), mask=rows < M, sem="relaxed")
    if ACROSS:
        columns = first_column + tl.arange(0, COLUMNS)
        tl.atomic_max(most_t + columns, tl.max(size, 0), mask=columns < K, sem="relaxed")


@triton.jit
def _quantize_lines(values, most, data, scales, first_row, first_column, row_count, width,
                    E: tl.constexpr, S: tl.constexpr):
    """Rows of ``values``, each with its scale, which the first tile of a row stores."""
    rows = first_row + tl.arange(0, values.shape[0])
    inside = rows < row_count
    scale = one_level(as_float(tl.load(most + rows, mask=inside, other=0)), S)
    if first_column == 0:
        tl.store(scales + rows, scale, mask=inside)
    store_codes(row_codes(values, scale, 0.0, E, 0), data, first_row, first_column, row_count,
                width, E[1])


@triton.jit
def lines_kernel(
    x, most, most_t, data, scales, data_t, scales_t, M, K, row_stride, column_stride, width,
    width_t, E: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, GIVEN: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile. WHOLE: one scale for all, by ``most`` [1]. GIVEN: that is not the data's, and Inf
    becomes NaN, as it would by its own scale."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    values = load_tile(x, first_row, first_column, M, K, row_stride, column_stride, ROWS, COLUMNS)
    if WHOLE:
        if GIVEN:
            values = tl.where(magnitude(values) == INF, float("nan"), values)
        scale = one_level(as_float(tl.zeros((ROWS,), tl.int32) + tl.load(most)), S)
        rows = first_row + tl.arange(0, ROWS)
        if first_column == 0:
            tl.store(scales + rows, scale, mask=rows == 0)
            tl.store(scales_t + rows, scale, mask=rows == 0)
        codes = row_codes(values, scale, 0.0, E, 0)
        if ALONG:
            store_codes(codes, data, first_row, first_column, M, width, E[1])
        if ACROSS:
            store_codes(tl.trans(codes), data_t, first_column, first_row, K, width_t, E[1])
    else:
        if ALONG:
            _quantize_lines(values, most, data, scales, first_row, first_column, M, width, E, S)
        if ACROSS:
            _quantize_lines(tl.trans(values), most_t, data_t, scales_t, first_column, first_row, K,
                            width_t, E, S)
