"""Products of few rows with stored weights: y[m, n] = Σ_k x[m, k]·ŵ[n, k] (+ bias[n]).

    x [M, K] bfloat16; w [N, words of 32 bits] codes of 4 or 8 bits, scales as stored
    out as of ``products``

Here the time goes into decoding, not into memory or products: a device that reads 4.8 TB/s has some
four instructions for each weight of 4 bits. So a word is decoded two codes at a time, in the two
halves of a register, to bfloat16: what is cut out of the word is moved to where exponent and
fraction are, and one multiplication, exact, makes up for the bias and brings the scale in.

    code      s ee m                      of E2M1
    bfloat16  s 000000ee m000000          times 2^126, times the scale; OFFSET less is in the factor
    integers  0 10000110 000cccc          128 + c, less 128 + zero point

Halves are codes c and c + PER/2 of a word of PER: x's columns are brought into the same order, in
registers. Weights are the left factor, which stays in registers. What that takes of the numbers is
``..words.is_plain``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.numbers import as_bits, as_float, store_float
from scaleprop.backends.cuda.kernels.products import finished, tile_at
from scaleprop.backends.cuda.kernels.reading import scale_of

_FOLDED = tl.constexpr(2)
_PART = tl.constexpr(3)
_HIGH = tl.constexpr(-0x10000)
_SIGNS = tl.constexpr(-0x7FFF8000)  # of both halves
_ONE = tl.constexpr(0x3F803F80)
_MIDDLE = tl.constexpr(0x43004300)  # 128, whose step is 1 in bfloat16
_LESS = tl.constexpr(-0x3CFF3D00)  # -128
_EIGHT_LESS = tl.constexpr(-0x3CF73CF8)  # -136
_FLIPPED = tl.constexpr(-0x77777778)  # the highest bit of each of eight codes


@triton.jit
def fused(pairs, factor, addend, NATIVE: tl.constexpr):
    """pairs·factor + addend, of bfloat16 in both halves of int32, where that is exact."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, factor, addend], dtype=tl.int32,
            is_pure=True, pack=1)
    else:
        low = as_float(pairs << 16) * as_float(factor << 16) + as_float(addend << 16)
        high = as_float(pairs & _HIGH) * as_float(factor & _HIGH) + as_float(addend & _HIGH)
        return ((as_bits(low) >> 16) & 0xFFFF) | (as_bits(high) & _HIGH)


@triton.jit
def moved(words, LEFT: tl.constexpr):
    """By so many bits to the left, or to the right."""
    if LEFT >= 0:
        return words << LEFT
    else:
        return words >> -LEFT


@triton.jit
def pairs_of(words, factor, addend, PLACE: tl.constexpr, P: tl.constexpr, NATIVE: tl.constexpr):
    """Values of codes PLACE and PLACE + half of a word's, as bfloat16 in both halves."""
    AT: tl.constexpr = P[0] * PLACE
    if P[1]:
        codes = (moved(words, -AT) & 0x000F000F) | _MIDDLE
    else:
        codes = (moved(words, P[2] - AT) & P[3]) | (moved(words, 16 - P[0] - AT) & _SIGNS)
    return fused(codes, factor, addend, NATIVE)


@triton.jit
def halves_of(pairs, NATIVE: tl.constexpr):
    """[..., 2]: bfloat16, or the same in float32."""
    if NATIVE:
        return tl.join(pairs.to(tl.int16).to(tl.bfloat16, bitcast=True),
                       (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))
    else:
        return tl.join(as_float(pairs << 16), as_float(pairs & _HIGH))


@triton.jit
def values_of(words, factor, addend, P: tl.constexpr, NATIVE: tl.constexpr):
    """[columns, codes] of words [columns, words], PLACE by PLACE, its two halves together."""
    PER: tl.constexpr = 32 // P[0]
    first = halves_of(pairs_of(words, factor, addend, 0, P, NATIVE), NATIVE)
    second = halves_of(pairs_of(words, factor, addend, 1, P, NATIVE), NATIVE)
    if PER == 8:
        third = halves_of(pairs_of(words, factor, addend, 2, P, NATIVE), NATIVE)
        fourth = halves_of(pairs_of(words, factor, addend, 3, P, NATIVE), NATIVE)
        found = tl.join(tl.join(first, third), tl.join(second, fourth))
        found = tl.permute(found, (0, 1, 3, 4, 2))
    else:
        found = tl.permute(tl.join(first, second), (0, 1, 3, 2))
    return tl.reshape(found, (words.shape[0], words.shape[1] * PER))


@triton.jit
def in_order(x, PER: tl.constexpr):
    """Columns of x [rows, columns] in the order of ``values_of``."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    parted = tl.reshape(x, (rows, columns // PER, 2, PER // 2))
    return tl.reshape(tl.permute(parted, (0, 1, 3, 2)), (rows, columns))


@triton.jit
def over_words(groups, WORDS: tl.constexpr):
    """[columns, groups] → [columns, WORDS]."""
    columns: tl.constexpr = groups.shape[0]
    count: tl.constexpr = groups.shape[1]
    spread = tl.broadcast_to(groups[:, :, None], (columns, count, WORDS // count))
    return tl.reshape(spread, (columns, WORDS))


@triton.jit
def group_factors(codes, W: tl.constexpr, P: tl.constexpr, NATIVE: tl.constexpr):
    """What values of groups are multiplied with, of their stored scales, in both halves."""
    codes = codes.to(tl.int32)
    if W[1] == 1:
        return ((codes + P[5]) << 7) | ((codes + P[5]) << 23)
    else:
        if W[1] == 3:
            scale = (codes & 0xFFFF) | (codes << 16)
        else:
            scale = ((codes | (codes << 16)) & P[6]) << P[7]
        # in two steps: together they may be a power of two that bfloat16 has not
        none = tl.full(scale.shape, _SIGNS, tl.int32)
        scale = fused(scale, tl.full(scale.shape, P[8], tl.int32), none, NATIVE)
        return fused(scale, tl.full(scale.shape, P[9], tl.int32), none, NATIVE)


@triton.jit
def weights(w, w_scales, w_zeros, line, column, first, w_stride, width, W: tl.constexpr,
            P: tl.constexpr, AT: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
            NATIVE: tl.constexpr):
    """[columns, DEPTH] in the order of ``values_of``, with scales of groups where AT is FOLDED."""
    WORDS: tl.constexpr = DEPTH * P[0] // 32
    word = first // (32 // P[0]) + tl.arange(0, WORDS)
    place = w + column[:, None] * w_stride + word[None, :]
    words = tl.load(place) if EVEN else tl.load(place, mask=(word < w_stride)[None, :], other=0)
    factor = tl.full(words.shape, P[4], tl.int32)
    addend = tl.full(words.shape, _SIGNS, tl.int32)
    if AT == _FOLDED or W[3]:
        COUNT: tl.constexpr = DEPTH // W[5] if DEPTH > W[5] else 1
        group = first // W[5] + tl.arange(0, COUNT)
        place = line[:, None] * width + group[None, :]
        place = (w_zeros if W[3] else w_scales) + place
        found = tl.load(place) if EVEN else tl.load(place, mask=(group < width)[None, :], other=0)
        if W[3]:
            zero = found.to(tl.int32)
            addend = over_words((zero | (zero << 16)) | _LESS, WORDS)
        else:
            factor = over_words(group_factors(found, W, P, NATIVE), WORDS)
    elif P[1]:
        words ^= _FLIPPED  # two's complement to 0..15
        addend = tl.full(words.shape, _EIGHT_LESS, tl.int32)
    return values_of(words, factor, addend, P, NATIVE)


@triton.jit(do_not_specialize=["key"])
def words_kernel(
    x, w, w_scales, w_zeros, w_outer, bias, out, M, N, K, x_stride, w_stride, width, key,
    W: tl.constexpr, P: tl.constexpr, W_AT: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``products.product_kernel``. w_stride: in words. P: ``..words.Pairs``. EVEN: K is whole
    steps. What lies beyond M and N is read from the last row, and not stored."""
    first_row, first_column = tile_at(M, N, ROWS, COLUMNS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    line_x = tl.minimum(row, M - 1) * x_stride
    near = tl.minimum(column, N - 1)
    line = near // W[4] if W[4] > 1 else near
    steps = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS)
    start = tl.program_id(1) * steps * DEPTH
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for first in range(start, tl.minimum(start + steps * DEPTH, K), DEPTH):
        k = first + tl.arange(0, DEPTH)
        place = x + line_x[:, None] + k[None, :]
        a = tl.load(place) if EVEN else tl.load(place, mask=(k < K)[None, :], other=0.0)
        a = in_order(a if NATIVE else a.to(tl.float32), 32 // P[0])
        b = weights(w, w_scales, w_zeros, line, near, first, w_stride, width, W, P, W_AT, DEPTH,
                    EVEN, NATIVE)
        if W_AT == _PART:
            part = tl.dot(b, tl.trans(a), input_precision="ieee")
            scale = scale_of(tl.load(w_scales + line * width + first // W[5]), W)
            total += part * scale[:, None]
        else:
            total = tl.dot(b, tl.trans(a), total, input_precision="ieee")
    if not P[1]:
        total *= P[10]
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    total = tl.trans(total)
    if SPLITS == 1:
        y = finished(total, x, x, x, w_scales, w_outer, w, bias, row, column, M, N, None, W, 0,
                      W_AT, tl.float32, BIAS)
        store_float(out + place, y, inside)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + place, total, mask=inside)
