"""Quantizing in blocks and tiles: amax, scale and codes of each group, in one read.

    x [M, K] float32, bfloat16 or float16, any strides
    data [M, bytes of K padded to whole groups], scales [⌈M/R⌉, ⌈K/C⌉] of groups of R rows by C
    columns; along the rows of x, of xᵀ, or of both from the same read

Of two-level formats the tensor's amax is found first, by a kernel of its own. Rows (of x, of xᵀ)
may be rotated first, x·diag(signs)·H/√block in blocks that lie in a tile: in registers, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import (
    as_float,
    divided,
    encode,
    encode_drawn,
    magnitude,
    one_level,
    reciprocal_power,
    stored_scale,
    tensor_factors,
    two_level,
)
from scaleprop.backends.cuda.kernels.random import random_numbers
from scaleprop.backends.cuda.kernels.rotating import rotated
from scaleprop.backends.cuda.kernels.storing import store_codes


@triton.jit
def amax_kernel(x, signs, sign_count, out, M, K, row_stride, column_stride, H: tl.constexpr,
                FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out: int32 [1], the bits of the largest magnitude, of rows rotated where H; begins as 0."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        values = tl.load(x + rows[:, None] * row_stride + columns[None, :] * column_stride,
                         mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)
        values = values.to(tl.float32)
        if H > 0:
            values = rotated(values, columns, signs, sign_count, H, FACTOR)
        most = tl.maximum(most, magnitude(values))
    tl.atomic_max(out, tl.max(tl.max(most, 1), 0))


@triton.jit
def coded(values, drawn, encoding, decoding, E: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
          C: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, PRESCALE: tl.constexpr = 1.0):
    """Codes [rows, columns] of values, and scales [rows / R, columns / C]."""
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    grouped = tl.reshape(values, (rows // R, R, columns // C, C))
    amax = as_float(tl.max(tl.max(magnitude(grouped), 3), 1))
    if S[1]:
        scale, factor = two_level(amax, encoding, decoding, S)
        units = grouped * factor[:, None, :, None]
    else:
        scale = one_level(amax, S)
        if S[0]:
            units = grouped * reciprocal_power(scale)[:, None, :, None]
        else:
            units = divided(grouped, scale[:, None, :, None])
    units = tl.reshape(units, (rows, columns))
    if PRESCALE != 1.0:
        units *= PRESCALE
    if MODE == 0:
        codes = encode(units, E, True)
        if E[10] == 0:  # NaN is that of whole groups
            known = factor == factor if S[1] else amax < float("inf")
            known = tl.broadcast_to(known[:, None, :, None], grouped.shape)
            codes = tl.where(tl.reshape(known, codes.shape), codes, E[8] if E[8] >= 0 else 0)
        return codes, scale
    else:
        return encode_drawn(units, drawn, E, BITS, MODE), scale


@triton.jit
def store_scales(scale, scales, first_row, first_column, row_count, width, S: tl.constexpr):
    rows: tl.constexpr = scale.shape[0]
    columns: tl.constexpr = scale.shape[1]
    row = first_row + tl.arange(0, rows)
    column = first_column + tl.arange(0, columns)
    tl.store(scales + row[:, None] * width + column[None, :],
             stored_scale(scale, S).to(scales.dtype.element_ty),
             mask=(row < row_count)[:, None] & (column < width)[None, :])


@triton.jit
def store_quantized(values, drawn, amax, whole, data, scales, first_row, first_column, row_count,
                    width, scale_rows, scale_columns, E: tl.constexpr, S: tl.constexpr,
                    R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr,
                    PRESCALE: tl.constexpr):  # fmt: skip
    """One tile's codes and scales along its rows, and by the first tile the tensor's scale."""
    encoding = 1.0
    decoding = 1.0
    if S[1]:
        outer, encoding, decoding = tensor_factors(as_float(tl.load(amax)), S)
        tl.store(whole, outer, mask=(first_row == 0) & (first_column == 0))
    codes, scale = coded(values, drawn, encoding, decoding, E, S, R, C, BITS, MODE, PRESCALE)
    store_codes(codes, data, first_row, first_column, row_count, width, E[1])
    store_scales(scale, scales, first_row // R, first_column // C, scale_rows, scale_columns, S)


@triton.jit(do_not_specialize=["seed", "drawn_row"])
def quantize_kernel(
    x, bits, signs, sign_count, amax, data, scales, data_t, scales_t, whole, whole_t, seed,
    stream, step, stream_t, drawn_row, M, K, row_stride, column_stride, bits_row_stride,
    bits_column_stride, width, scale_rows, scale_columns, width_t, scale_rows_t, scale_columns_t,
    E: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr,
    BITS: tl.constexpr, MODE: tl.constexpr, PHILOX: tl.constexpr, PRESCALE: tl.constexpr,
    H: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by COLUMNS, of whole groups ALONG rows, ACROSS them, or both.

    amax: [2], along and across where H, else one for both. drawn_row: the row
    that random numbers begin with.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    values = tl.load(x + rows[:, None] * row_stride + columns[None, :] * column_stride,
                     mask=inside, other=0.0).to(tl.float32)
    drawn = 0
    if MODE > 0 and not PHILOX:
        drawn = tl.load(bits + rows[:, None] * bits_row_stride
                        + columns[None, :] * bits_column_stride, mask=inside, other=0)
        drawn = drawn.to(tl.int32)
    if ALONG:
        if PHILOX:
            drawn = random_numbers(drawn_row + first_row, first_column, seed, tl.load(stream),
                                   tl.load(step), BITS, ROWS, COLUMNS)
        turned = rotated(values, columns, signs, sign_count, H, FACTOR) if H > 0 else values
        store_quantized(turned, drawn, amax, whole, data, scales, first_row, first_column, M,
                        width, scale_rows, scale_columns, E, S, R, C, BITS, MODE, PRESCALE)
    if ACROSS:
        if PHILOX:
            drawn = random_numbers(drawn_row + first_row, first_column, seed, tl.load(stream_t),
                                   tl.load(step), BITS, ROWS, COLUMNS)
        if MODE > 0:
            drawn = tl.trans(drawn)
        turned = tl.trans(values)
        if H > 0:
            turned = rotated(turned, rows, signs, sign_count, H, FACTOR)
            amax += 1
        store_quantized(turned, drawn, amax, whole_t, data_t, scales_t, first_column, first_row, K,
                        width_t, scale_rows_t, scale_columns_t, E, S, R, C, BITS, MODE, PRESCALE)
