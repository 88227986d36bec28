"""Random bits by counting, inside kernels: the numbers of ``scaleprop.formats.random``."""

from __future__ import annotations

import triton
import triton.language as tl

_FIRST = tl.constexpr(0xD2511F53)
_SECOND = tl.constexpr(0xCD9E8D57)
_WEYL_FIRST = tl.constexpr(0x9E3779B9)
_WEYL_SECOND = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(a, b, c, d, seed, stream):
    """Philox4x32-10: four words of a counter, two of a key, all uint32, to four words."""
    first = tl.full((), _FIRST, tl.uint32)
    second = tl.full((), _SECOND, tl.uint32)
    for _ in tl.static_range(10):
        left, left_high = a * first, tl.umulhi(a, tl.broadcast_to(first, a.shape))
        right, right_high = c * second, tl.umulhi(c, tl.broadcast_to(second, c.shape))
        a, b = right_high ^ b ^ seed, right
        c, d = left_high ^ d ^ stream, left
        seed += tl.full((), _WEYL_FIRST, tl.uint32)
        stream += tl.full((), _WEYL_SECOND, tl.uint32)
    return a, b, c, d


@triton.jit
def random_numbers(first_row, first_column, seed, stream, step, BITS: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS] of 0..2^BITS-1, of a tile that begins where a call of Philox does.

    seed, stream: their 32 bits. step: int64. One call of Philox serves the rows that 128 bits have
    numbers for.
    """
    WIDTH: tl.constexpr = 8 if BITS <= 8 else 16 if BITS <= 16 else 32
    GROUP: tl.constexpr = 128 // WIDTH
    GROUPS: tl.constexpr = ROWS // GROUP if ROWS > GROUP else 1
    KIND: tl.constexpr = 1 if WIDTH == 8 else 2 if WIDTH == 16 else 3
    zero = tl.zeros((GROUPS, COLUMNS), tl.uint32)
    low = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    high = zero + (((step >> 32) & 0x0FFFFFFF).to(tl.uint32) | (KIND << 28))
    group = zero + (first_row // GROUP + tl.arange(0, GROUPS))[:, None].to(tl.uint32)
    column = zero + (first_column + tl.arange(0, COLUMNS))[None, :].to(tl.uint32)
    a, b, c, d = philox(low, column, high, group, seed.to(tl.uint32), stream.to(tl.uint32))
    place = (first_row + tl.arange(0, ROWS)) % GROUP
    place = tl.reshape(place, (GROUPS, ROWS // GROUPS, 1)).to(tl.uint32)
    word = place // (32 // WIDTH)
    a, b, c, d = a[:, None, :], b[:, None, :], c[:, None, :], d[:, None, :]
    drawn = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    drawn = (drawn >> (place % (32 // WIDTH) * WIDTH)) & ((1 << BITS) - 1)
    return tl.reshape(drawn, (ROWS, COLUMNS)).to(tl.int32)


@triton.jit(do_not_specialize=["seed"])
def random_kernel(out, rows, columns, seed, stream, step, BITS: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out: int32 [rows, columns]. stream, step: int64 [1]."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    numbers = random_numbers(first_row, first_column, seed, tl.load(stream), tl.load(step), BITS,
                             ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    tl.store(out + row[:, None].to(tl.int64) * columns + column[None, :], numbers,
             mask=(row < rows)[:, None] & (column < columns)[None, :])
