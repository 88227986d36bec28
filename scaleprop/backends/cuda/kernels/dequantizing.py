"""Dequantizing: stored parts to float32, bfloat16 or float16.

    data [M, bytes of K], scales and zero points of groups of R rows by C columns, of rows, or one
    out [M, K]; of bfloat16, its bits in int16
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import store_float
from scaleprop.backends.cuda.kernels.reading import load_codes, load_groups, scale_of, values_of


@triton.jit
def dequantize_kernel(
    data, scales, zeros, outer, out, M, K, width, scale_width, out_stride,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by COLUMNS: whole groups along its rows."""
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    codes = load_codes(data, row * width, row < M, first_column, width, COLUMNS, F[0][1])
    values = values_of(codes, F)
    if F[3]:
        zero = load_groups(zeros, row, row < M, first_column, scale_width, F, COLUMNS)
        values -= zero.to(tl.float32)
    scale = load_groups(scales, row, row < M, first_column, scale_width, F, COLUMNS)
    values *= scale_of(scale, F)
    if F[6]:
        values *= tl.load(outer)
    store_float(out + row[:, None] * out_stride + column[None, :], values,
                (row < M)[:, None] & (column < K)[None, :])
