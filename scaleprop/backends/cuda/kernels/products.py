"""Products of stored operands: y[m, n] = Σ_k x̂[m, k]·ŵ[n, k] (+ bias[n]).

    x [M, K] float32, bfloat16 or float16, or stored parts; w [N, K] stored parts
    out [M, N] float32, float16, or the bits of bfloat16 in int16; or partial sums [SPLITS, M, N]

A tile's operands are decoded in registers, exactly, into the type that is multiplied: bytes,
float8, or floats wide enough for element values. Where scales come in is a constant of each
operand: AFTER the whole sum (of rows, of the tensor), FOLDED into the values (exact: powers of two,
or few enough bits; else, where float32 is multiplied, each value is rounded to it once), or after
each PART of the sum that shares a scale. Otherwise nothing is rounded but sums and, once each,
scaled sums. K is cut into SPLITS ranges where rows are few; a second kernel adds
these up in order, so results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import store_float
from scaleprop.backends.cuda.kernels.reading import (
    load_codes,
    load_groups,
    scale_of,
    signed,
    values_of,
)

PLAIN, AFTER, FOLDED, PART = (tl.constexpr(place) for place in range(4))
_MIDDLE = tl.constexpr(128)  # taken off bytes with zero points, to make them signed


@triton.jit
def _values(data, scales, zeros, row, inside, first, K, stride, scale_width, F: tl.constexpr,
            WHERE: tl.constexpr, DOT: tl.constexpr, DEPTH: tl.constexpr):
    """[rows, DEPTH] of an operand, in DOT; 0 outside."""
    line = row * stride
    if WHERE == PLAIN:
        column = first + tl.arange(0, DEPTH)
        found = tl.load(data + line[:, None] + column[None, :],
                        mask=inside[:, None] & (column < K)[None, :], other=0.0)
        return found.to(tl.float32).to(DOT)
    else:
        codes = load_codes(data, line, inside, first, stride, DEPTH, F[0][1])
        if DOT == tl.int8:
            return (codes - _MIDDLE if F[3] else signed(codes, F[0][1])).to(tl.int8)
        elif DOT == tl.float8e4nv:
            return codes.to(tl.uint8).to(tl.float8e5 if F[0][3] == 2 else DOT, bitcast=True)
        else:
            values = values_of(codes, F)
            if F[3]:
                zero = load_groups(zeros, row, inside, first, scale_width, F, DEPTH)
                column = first + tl.arange(0, DEPTH)
                values = tl.where((column < K)[None, :], values - zero.to(tl.float32), 0.0)
            if WHERE == FOLDED:
                values *= scale_of(load_groups(scales, row, inside, first, scale_width, F, DEPTH),
                                   F)
            return values.to(DOT)


@triton.jit
def _part_scales(scales, row, inside, first, scale_width, F: tl.constexpr):
    """[rows]: of the part of K that begins at ``first``."""
    found = tl.load(scales + row // F[4] * scale_width + first // F[5], mask=inside, other=1)
    return scale_of(found, F)


@triton.jit
def tile_at(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column, of tiles in an order in which neighbours share what they read."""
    program = tl.program_id(0)
    down = tl.cdiv(M, ROWS)
    band = GROUP * tl.cdiv(N, COLUMNS)
    first = program // band * GROUP
    height = tl.maximum(tl.minimum(down - first, GROUP), 1)  # without rows, too
    place = program % band
    return ((first + place % height).to(tl.int64) * ROWS,
            (place // height).to(tl.int64) * COLUMNS)


@triton.jit
def finished(total, x_scales, x_zeros, x_outer, w_scales, w_outer, sums, bias, row, column, M, N,
              X: tl.constexpr, W: tl.constexpr, X_AT: tl.constexpr, W_AT: tl.constexpr,
              DOT: tl.constexpr, BIAS: tl.constexpr):
    """float32 [rows, columns]: what belongs after the whole sum."""
    if DOT == tl.int8 and X[3]:
        zero = load_groups(x_zeros, row, row < M, 0, 1, X, 16).to(tl.int32)
        total += (_MIDDLE - zero) * tl.load(sums + column, mask=column < N, other=0)[None, :]
    y = total.to(tl.float32)
    if DOT == tl.int8 and X_AT == AFTER and W_AT == AFTER:
        y *= 1.0 / (X[0][7] * W[0][7])
    if X_AT == AFTER:
        y *= scale_of(load_groups(x_scales, row, row < M, 0, 1, X, 16), X)
    if W_AT == AFTER:
        scale = scale_of(load_groups(w_scales, column, column < N, 0, 1, W, 16), W)
        y *= tl.trans(scale) if W[4] else scale
    if X_AT != PLAIN and X[6]:
        y *= tl.load(x_outer)
    if W[6]:
        y *= tl.load(w_outer)
    if BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["key"])
def product_kernel(
    x, x_scales, x_zeros, x_outer, w, w_scales, w_zeros, w_outer, sums, bias, out,
    M, N, K, x_stride, x_scale_width, w_stride, w_scale_width, key,
    X: tl.constexpr, W: tl.constexpr, X_AT: tl.constexpr, W_AT: tl.constexpr, DOT: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by COLUMNS, of one range of K. key: stands for what tiles are chosen for
    besides sizes: Triton keeps choices by arguments, not by constants that are compiled in."""
    first_row, first_column = tile_at(M, N, ROWS, COLUMNS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    steps = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS)
    start = tl.program_id(1) * steps * DEPTH
    WHOLE: tl.constexpr = X_AT != PART and W_AT != PART
    SUM: tl.constexpr = tl.int32 if DOT == tl.int8 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), SUM if WHOLE else tl.float32)
    for first in range(start, tl.minimum(start + steps * DEPTH, K), DEPTH):
        a = _values(x, x_scales, x_zeros, row, row < M, first, K, x_stride, x_scale_width, X, X_AT,
                    DOT, DEPTH)
        b = _values(w, w_scales, w_zeros, column, column < N, first, K, w_stride, w_scale_width, W,
                    W_AT, DOT, DEPTH)
        if ROWS == 1:
            part = tl.sum(a.to(SUM) * b.to(SUM), 1)[None, :]
            total += part if WHOLE else 0
        elif WHOLE:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee",
                           max_num_imprecise_acc=DEPTH, out_dtype=SUM)
        else:
            part = tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=SUM)
        if not WHOLE:
            part = part.to(tl.float32)
            if DOT == tl.int8:  # codes, which are values in units of the element
                part *= 1.0 / (X[0][7] * W[0][7])
            if X_AT == PART:
                part *= _part_scales(x_scales, row, row < M, first, x_scale_width, X)[:, None]
            if W_AT == PART:
                part *= _part_scales(w_scales, column, column < N, first, w_scale_width, W)[None, :]
            total += part
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    if SPLITS == 1:
        y = finished(total, x_scales, x_zeros, x_outer, w_scales, w_outer, sums, bias, row,
                      column, M, N, X, W, X_AT, W_AT, DOT, BIAS)
        store_float(out + place, y, inside)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + place, total, mask=inside)


@triton.jit
def sum_kernel(
    parts, x_scales, x_zeros, x_outer, w_scales, w_outer, sums, bias, out, M, N,
    X: tl.constexpr, W: tl.constexpr, X_AT: tl.constexpr, W_AT: tl.constexpr, DOT: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The SPLITS partial sums of one tile, in order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    total = tl.load(parts + place, mask=inside, other=0)
    size = tl.full((), 1, tl.int64) * M * N
    for split in range(1, SPLITS):
        total += tl.load(parts + size * split + place, mask=inside, other=0)
    y = finished(total, x_scales, x_zeros, x_outer, w_scales, w_outer, sums, bias, row, column, M,
                  N, X, W, X_AT, W_AT, DOT, BIAS)
    store_float(out + place, y, inside)
