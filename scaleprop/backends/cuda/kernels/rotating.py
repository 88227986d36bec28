"""Hadamard transforms of blocks, in registers: log2 of the block sums and differences a number."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(x, column, signs, sign_count, H: tl.constexpr, FACTOR: tl.constexpr):
    """x [rows, columns] float32 times diag(signs) and Sylvester's matrix over √H, on blocks of H
    columns. column: [columns], which of the matrix. signs: ±1, sign_count of them, in turn.
    FACTOR: 1/√H.
    """
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    x *= tl.load(signs + column % sign_count).to(tl.float32)[None, :]
    half: tl.constexpr = 1
    x = _butterflies(x, rows, columns, H, half)
    return x * FACTOR


@triton.jit
def _butterflies(x, rows: tl.constexpr, columns: tl.constexpr, H: tl.constexpr,
                 HALF: tl.constexpr):
    """Sums and differences of numbers HALF apart, then of those twice as far apart."""
    if HALF == H:
        return x
    else:
        pairs = tl.reshape(x, (rows, columns // (2 * HALF), 2, HALF))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        mixed = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        return _butterflies(tl.reshape(mixed, (rows, columns)), rows, columns, H, 2 * HALF)
