"""Products of MX blocks in units that take block scales: y[m, n] = Σ_k x̂[m, k]·ŵ[n, k] (+ bias[n]).

    x [M, bytes of K], w [N, bytes of K]: E4M3, E5M2, or E2M1, two a byte, the first in the low bits
    scales: E8M0 codes of blocks of 32 along K; [M, ⌈K/32⌉] as stored, or TILED
    out [M, N] float32, float16, or the bits of bfloat16 in int16; or partial sums [SPLITS, M, N]

Bytes are read as they are stored, K padded to whole blocks, and nothing is decoded. TILED scales
lie as ``..layouts.swizzled`` puts them. Those of 128 rows in a step are neighbours then, whole
tiles of 512 bytes, which ``tcgen05.cp`` takes from shared memory to the units' own as they are,
while products of the step before run. As stored, or of 256 rows, they pass through registers, and
a step waits for its products. FEW rows take a product of yᵀ, with scales as stored: ``tcgen05.mma``
wants 128 rows on one side, and at least 16 on the other.

Outside, bytes and scales are 0: 0·2^-127. A block whose scale is NaN (255) makes what it adds to
NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import store_float
from scaleprop.backends.cuda.kernels.products import tile_at

BLOCK = tl.constexpr(32)  # elements that share a scale
TILE_ROWS, TILE_COLUMNS = tl.constexpr(128), tl.constexpr(4)  # scales in a tile


@triton.jit
def _elements(data, row, row_count, first, width, NAME: tl.constexpr, DEPTH: tl.constexpr):
    """[rows, DEPTH] of float8, or [rows, DEPTH / 2] bytes of E2M1; 0 outside."""
    PACKED: tl.constexpr = 2 if NAME == "e2m1" else 1
    if NAME == "e4m3":
        data = data.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    elif NAME == "e5m2":
        data = data.to(tl.pointer_type(tl.float8e5), bitcast=True)
    column = first // PACKED + tl.arange(0, DEPTH // PACKED)
    return tl.load(data + (row * width)[:, None] + column[None, :],
                   mask=(row < row_count)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _scales(scales, first_row, row_count, first, width, ROWS: tl.constexpr, TILED: tl.constexpr,
            DEPTH: tl.constexpr):
    """[rows, DEPTH / 32] codes; 0 outside. width: scales in a row, of TILED ones tiles."""
    if TILED:
        DOWN: tl.constexpr = ROWS // TILE_ROWS
        ALONG: tl.constexpr = DEPTH // (BLOCK * TILE_COLUMNS)
        SIZE: tl.constexpr = TILE_ROWS * TILE_COLUMNS
        line = (first_row // TILE_ROWS + tl.arange(0, DOWN)) * width * SIZE
        place = first // (BLOCK * TILE_COLUMNS) * SIZE + tl.arange(0, ALONG * SIZE)
        down_inside = first_row + tl.arange(0, DOWN) * TILE_ROWS < row_count
        found = tl.load(scales + line[:, None] + place[None, :],
                        mask=down_inside[:, None] & (place < width * SIZE)[None, :], other=0)
        tiles = tl.reshape(found, (DOWN, ALONG, 32, 4, TILE_COLUMNS))
        return tl.reshape(tl.permute(tiles, (0, 3, 2, 1, 4)), (ROWS, DEPTH // BLOCK))
    else:
        row = first_row + tl.arange(0, ROWS)
        column = first // BLOCK + tl.arange(0, DEPTH // BLOCK)
        return tl.load(scales + (row * width)[:, None] + column[None, :],
                       mask=(row < row_count)[:, None] & (column < width)[None, :], other=0)


@triton.jit(do_not_specialize=["key"])
def scaled_kernel(
    x, x_scales, w, w_scales, bias, out, M, N, K, x_stride, x_scale_width, w_stride,
    w_scale_width, key, X: tl.constexpr, W: tl.constexpr, FEW: tl.constexpr, TILED: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by COLUMNS, of one range of K. X, W: names of elements. key: as
    ``product_kernel``'s."""
    first_row, first_column = tile_at(M, N, ROWS, COLUMNS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    steps = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS)
    start = tl.program_id(1) * steps * DEPTH
    total = tl.zeros((COLUMNS, ROWS) if FEW else (ROWS, COLUMNS), tl.float32)
    for first in range(start, tl.minimum(start + steps * DEPTH, K), DEPTH):
        a = _elements(x, row, M, first, x_stride, X, DEPTH)
        b = _elements(w, column, N, first, w_stride, W, DEPTH)
        a_scale = _scales(x_scales, first_row, M, first, x_scale_width, ROWS, TILED, DEPTH)
        b_scale = _scales(w_scales, first_column, N, first, w_scale_width, COLUMNS, TILED, DEPTH)
        if FEW:
            total = tl.dot_scaled(b, b_scale, W, tl.trans(a), a_scale, X, total)
        else:
            total = tl.dot_scaled(a, a_scale, X, tl.trans(b), b_scale, W, total)
    y = tl.trans(total) if FEW else total
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    if SPLITS == 1:
        if BIAS:
            y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        store_float(out + place, y, inside)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + place, y, mask=inside)
