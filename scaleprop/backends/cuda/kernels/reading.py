"""Stored tensors inside kernels: bytes to codes, codes to values, scales of groups.

What a format stores comes as a constant F, a ``Stored`` of ``..constants``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import NAN, as_float, decode, float_of

_HALF_LEAST = tl.constexpr(0x00400000)  # bits of 2^-127, code 0 of E8M0


@triton.jit
def load_codes(data, line, row_inside, first_column, width, COLUMNS: tl.constexpr,
               BITS: tl.constexpr):
    """int32 codes [rows, COLUMNS] of 4, 6 or 8 bits, from the bytes at data + line; 0 where a row
    is not inside, or ends. first_column: a multiple of what whole bytes hold."""
    rows: tl.constexpr = line.shape[0]
    if BITS == 8:
        column = first_column + tl.arange(0, COLUMNS)
        return tl.load(data + line[:, None] + column[None, :],
                       mask=row_inside[:, None] & (column < width)[None, :], other=0).to(tl.int32)
    elif BITS == 4:
        column = first_column // 2 + tl.arange(0, COLUMNS // 2)
        both = tl.load(data + line[:, None] + column[None, :],
                       mask=row_inside[:, None] & (column < width)[None, :], other=0).to(tl.int32)
        return tl.reshape(tl.join(both & 15, (both >> 4) & 15), (rows, COLUMNS))
    else:
        column = first_column // 4 * 3 + tl.arange(0, COLUMNS // 4) * 3
        inside = row_inside[:, None] & (column < width)[None, :]
        place = data + line[:, None] + column[None, :]
        low = tl.load(place, mask=inside, other=0).to(tl.int32)
        middle = tl.load(place + 1, mask=inside & (column + 1 < width)[None, :], other=0)
        high = tl.load(place + 2, mask=inside & (column + 2 < width)[None, :], other=0)
        bits = low | (middle.to(tl.int32) << 8) | (high.to(tl.int32) << 16)
        even = tl.join(bits & 63, (bits >> 12) & 63)
        odd = tl.join((bits >> 6) & 63, (bits >> 18) & 63)
        return tl.reshape(tl.join(even, odd), (rows, COLUMNS))


@triton.jit
def values_of(codes, F: tl.constexpr):
    """float32 of element codes; of formats with zero points, the codes themselves."""
    if F[3]:
        return float_of(codes)
    elif F[0][0]:
        return float_of(signed(codes, F[0][1])) * (1.0 / F[0][7])
    else:
        return decode(codes, F[0])


@triton.jit
def signed(codes, BITS: tl.constexpr):
    """Two's complement."""
    return (codes << (32 - BITS)) >> (32 - BITS)


@triton.jit
def scale_of(stored, F: tl.constexpr):
    """float32 of stored scales: floats, bits of bfloat16, powers of two (E8M0), or codes."""
    if F[1] == 0:
        return stored.to(tl.float32)
    elif F[1] == 3:
        return as_float(stored.to(tl.int32) << 16)
    elif F[1] == 1:
        code = stored.to(tl.int32)
        bits = tl.where(code == 0, _HALF_LEAST, code << 23)
        return as_float(tl.where(code == 255, NAN, bits))
    else:
        return decode(stored.to(tl.int32), F[2])


@triton.jit
def load_groups(scales, row, row_inside, first_column, width, F: tl.constexpr,
                COLUMNS: tl.constexpr):
    """Scales, or zero points, of a tile's elements, [rows, COLUMNS] or what broadcasts to that, as
    stored; 1 outside. first_column: a multiple of COLUMNS, which C divides, or a multiple of C."""
    if F[4] == 0:
        return tl.load(scales)
    elif F[5] == 0:
        return tl.load(scales + row, mask=row_inside, other=1)[:, None]
    else:
        line = scales + (row // F[4])[:, None] * width
        if F[5] >= COLUMNS:
            return tl.load(line + first_column // F[5], mask=row_inside[:, None], other=1)
        else:
            group = first_column // F[5] + tl.arange(0, COLUMNS // F[5])
            found = tl.load(line + group[None, :], mask=row_inside[:, None]
                            & (group < width)[None, :], other=1)
            spread = tl.broadcast_to(found[:, :, None], (row.shape[0], COLUMNS // F[5], F[5]))
            return tl.reshape(spread, (row.shape[0], COLUMNS))
