"""Block Hadamard transforms of every size n = K·2^m, K in {1, 12, 20, 28}: ±1 matrices, H·Hᵀ = n·I.

2^m: Sylvester, symmetric. 12 and 20: Paley I over GF(11) and GF(19), not symmetric. 28: Paley II
over GF(13), symmetric. K·2^m: the Kronecker product of both; so 40·2^m are the 20·2^(m+1).
R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933). Tables of one order that
others publish (as QuaRot's) differ by permutations and signs: not interchangeable with these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.tensor import normalized_axis

_WHOLE = 192  # sizes up to it are multiplied by at once, as measured; others in two steps,
_STEP = 64  # of Sylvester matrices up to this size
_PRIMES = {12: 11, 20: 19, 28: 13}  # order that is no power of two → field of its Paley matrix


def hadamard(x: Tensor, block: int, signs: Tensor | None = None, axis: int = -1,
             transpose: bool = False) -> Tensor:
    """x·diag(signs)·H/√block on consecutive blocks of ``axis``, or x·Hᵀ/√block·diag(signs).

    Each is the other's inverse and gradient. block: 2^m, 12·2^m, 20·2^m, 28·2^m (so 40·2^m too),
    dividing the axis. signs: ±1, [block] or [size of the axis]. float32 accumulation (float64 for
    float64), one rounding to x's dtype.

    Raises:
        FormatError: where block or signs do not fit.
    """
    check_hadamard(x, block, signs, axis)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    index = normalized_axis(axis, x.ndim)
    blocks, after = x.shape[index] // block, x.shape[index + 1:]
    split = x.to(work).reshape(*x.shape[:index], blocks, block, math.prod(after))
    flips = None if signs is None else signs.to(work).reshape(-1, block, 1)
    flat = split.flatten(0, -3)
    if flips is not None and block <= _WHOLE and signs is not None and signs.shape[0] == block:
        mixed = _times(flat, _signed(block, flips[0], transpose))
    elif flips is None:
        mixed = _mixed(flat, block, transpose)
    elif transpose:
        mixed = _mixed(flat, block, True).reshape(split.shape) * flips
    else:
        mixed = _mixed((split * flips).flatten(0, -3), block, False)
    # first the view: of the product in memory, so that a compiler's loops over it stay simple
    return (mixed.reshape(x.shape) * (1.0 / math.sqrt(block))).to(x.dtype)


def _signed(block: int, signs: Tensor, transpose: bool) -> Tensor:
    """diag(signs)·H, or Hᵀ·diag(signs); signs [block, 1]."""
    matrix = hadamard_matrix(block, signs.dtype, signs.device) * signs
    return matrix.t() if transpose else matrix


def _mixed(x: Tensor, size: int, transpose: bool) -> Tensor:
    """x·H or x·Hᵀ on the middle axis of x [n, size, m]; H of large sizes is the Kronecker product
    of two smaller ones, the inner a Sylvester matrix, which is its own transpose."""
    if size <= _WHOLE:
        matrix = hadamard_matrix(size, x.dtype, x.device)
        return _times(x, matrix.t() if transpose else matrix)
    step = min(size // _order(size), _STEP)
    inner = x.reshape(-1, step, x.shape[-1])
    inner = _times(inner, sylvester_matrix(step, x.dtype, x.device))
    return _mixed(inner.reshape(-1, size // step, step * x.shape[-1]), size // step, transpose)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Σ_k x[n, k, m]·matrix[k, j], [n, j, m]: with no copy of x, whatever m."""
    if x.shape[-1] == 1:
        return torch.mm(x.squeeze(-1), matrix).unsqueeze(-1)
    return torch.bmm(matrix.t().expand(x.shape[0], -1, -1), x)


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H of ±1, [size, size], unscaled: Paley's matrix ⊗ Sylvester's."""
    order = _order(size)
    sylvester = sylvester_matrix(size // order, dtype, device)
    if order == 1:
        return sylvester
    paley = _paley_one(order, device) if order != 28 else _paley_two(order, device)
    product = paley.to(dtype).unsqueeze(-1).unsqueeze(1) * sylvester.unsqueeze(1)
    return product.reshape(size, size)


def sylvester_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H[i, j] = (-1)^(number of ones in i & j), unscaled."""
    index = torch.arange(size, device=device)
    common = index.unsqueeze(1) & index
    odd = torch.zeros_like(common)
    for shift in range(max(size.bit_length() - 1, 1)):
        odd = odd ^ (common >> shift)
    return (1 - 2 * (odd & 1)).to(dtype)


def _paley_one(order: int, device: torch.device) -> Tensor:
    """I + S over GF(order - 1), order - 1 ≡ 3 mod 4; S = [[0, 1], [-1, χ(i - j)]] is skew."""
    index = torch.arange(order, device=device)
    row = index.unsqueeze(1)
    inside = torch.where(row == index, 1, _character(row - index, _PRIMES[order]))
    return torch.where(row == 0, 1, torch.where(index == 0, -1, inside))


def _paley_two(order: int, device: torch.device) -> Tensor:
    """C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] over GF(order/2 - 1), a prime ≡ 1 mod 4;
    C = [[0, 1], [1, χ(i - j)]] is symmetric."""
    index = torch.arange(order, device=device)
    row = index.unsqueeze(1)
    i, j, a, b = row >> 1, index >> 1, row & 1, index & 1
    edge = (i == 0) | (j == 0)
    off = torch.where(edge, 1, _character(i - j, _PRIMES[order])) * (1 - 2 * (a & b))
    return torch.where(i == j, 1 - 2 * (a | b), off)


def _character(difference: Tensor, prime: int) -> Tensor:
    """χ: 1 for squares modulo the prime, -1 for others (0 is not asked for)."""
    squares = sum(1 << square for square in {k * k % prime for k in range(1, prime)})
    return 2 * ((squares >> (difference % prime)) & 1) - 1


def _order(size: int) -> int:
    """K of a supported size, 1 for powers of two; 0 where there is none."""
    odd = size // (size & -size)
    order = 1 if odd == 1 else 4 * odd
    return order if (order == 1 or order in _PRIMES) and size % order == 0 else 0


def hadamard_sizes(limit: int) -> list[int]:
    """Every supported size up to ``limit``, ascending."""
    return [size for size in range(1, limit + 1) if _order(size)]


def check_hadamard(x: Tensor, block: int, signs: Tensor | None, axis: int) -> None:
    """Raise ``FormatError`` for arguments that ``hadamard`` cannot take."""
    normalized_axis(axis, x.ndim)
    if not x.is_floating_point():
        raise FormatError(f"hadamard: {x.dtype} is not a float dtype: convert first")
    check_block(block)
    size: Any = x.shape[axis]
    if isinstance(size, int) and size % block:
        raise FormatError(f"hadamard: block {block} does not divide axis {axis} of size {size}: "
                          "use a smaller block")
    if signs is not None and tuple(signs.shape) not in ((block,), (size,)):
        raise FormatError(f"hadamard: signs have shape {list(signs.shape)}: [{block}] or [{size}]")


def check_block(block: int) -> None:
    """Raise ``FormatError`` for a size that there is no transform of."""
    if block < 1 or not _order(block):
        near = hadamard_sizes(2 * max(block, 1))
        below, above = ([size for size in near if size < block],
                        [size for size in near if size > block])
        raise FormatError(f"hadamard: block {block} is none of 2^m, 12·2^m, 20·2^m, 28·2^m: use "
                          + " or ".join(str(size) for size in (*below[-1:], *above[:1])))
