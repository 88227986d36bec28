"""Codes into bytes, as ``scaleprop.formats.packing`` packs them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_codes(codes, data, first_row, first_column, row_count, width, BITS: tl.constexpr):
    """Codes [rows, columns] of 4, 6 or 8 bits into data [row_count, width] of bytes."""
    rows: tl.constexpr = codes.shape[0]
    columns: tl.constexpr = codes.shape[1]
    row = first_row + tl.arange(0, rows)
    line = data + row[:, None] * width
    if BITS == 8:
        column = first_column + tl.arange(0, columns)
        tl.store(line + column[None, :], codes.to(tl.uint8),
                 mask=(row < row_count)[:, None] & (column < width)[None, :])
    elif BITS == 4:
        low, high = tl.split(tl.reshape(codes, (rows, columns // 2, 2)))
        column = first_column // 2 + tl.arange(0, columns // 2)
        tl.store(line + column[None, :], (low | (high << 4)).to(tl.uint8),
                 mask=(row < row_count)[:, None] & (column < width)[None, :])
    else:
        even, odd = tl.split(tl.reshape(codes, (rows, columns // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        column = first_column // 4 * 3 + tl.arange(0, columns // 4) * 3
        inside = (row < row_count)[:, None] & (column < width)[None, :]
        line += column[None, :]
        tl.store(line, ((first | (second << 6)) & 0xFF).to(tl.uint8), mask=inside)
        tl.store(line + 1, (((second >> 2) | (third << 4)) & 0xFF).to(tl.uint8),
                 mask=inside & (column + 1 < width)[None, :])
        tl.store(line + 2, ((third >> 4) | (fourth << 2)).to(tl.uint8),
                 mask=inside & (column + 2 < width)[None, :])
