"""Attention of few new queries over stored keys and values (flash decoding, arXiv:2311.01282).

    q [B·G, Q, D]: of each head of the cache, its H/G heads of T queries, Q = H/G·T
    keys, values [B·G, capacity, bytes of D], scales of groups along D, of rows, or one
    most, total [B·G, SPLITS, Q], partial [B·G, SPLITS, Q, D], float32
    out [B·G, Q, D]

A share of the positions gives each query its largest score m, l = Σ exp(s − m) and Σ exp(s − m)·v.
Shares are put together with weights exp(m − max m): in their order, whoever ends first.

A scale that D shares, s, is left out of the product: q·(s·k) = s·(q·k), p·(s·v) = (p·s)·v. Element
values are then exact in bfloat16, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.backends.cuda.kernels.functions import tanh
from scaleprop.backends.cuda.kernels.numbers import store_float
from scaleprop.backends.cuda.kernels.reading import load_codes, load_groups, scale_of, values_of

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _of_groups(rows, scales, zeros, outer, position, inside, scale_width, F: tl.constexpr):
    """Rows [positions, DEPTH] of codes' values to those of their groups: a scale is decoded once
    and then spread."""
    COUNT: tl.constexpr = rows.shape[1] // F[5]
    group = tl.arange(0, COUNT)
    place = (position // F[4])[:, None] * scale_width + group[None, :]
    held = inside[:, None] & (group < scale_width)[None, :]
    scale = scale_of(tl.load(scales + place, mask=held, other=1), F)
    if F[6]:
        scale *= tl.load(outer)
    grouped = tl.reshape(rows, (rows.shape[0], COUNT, F[5]))
    if F[3]:
        zero = tl.load(zeros + place, mask=held, other=1)
        grouped -= zero.to(tl.float32)[:, :, None]
    return tl.reshape(grouped * scale[:, :, None], rows.shape)


@triton.jit
def _loaded(data, scales, zeros, outer, position, inside, width, scale_width, F: tl.constexpr,
            DEPTH: tl.constexpr):
    """float32 rows [positions, DEPTH], and what is left to multiply them by, [1, positions]."""
    if F is None:
        depth = tl.arange(0, DEPTH)
        place = data + position[:, None] * width + depth[None, :]
        return tl.load(place, mask=inside[:, None] & (depth < width)[None, :],
                       other=0.0).to(tl.float32), 1.0
    else:
        codes = load_codes(data, position * width, inside, 0, width, DEPTH, F[0][1])
        rows = values_of(codes, F)
        if F[5] > 0 and F[5] < DEPTH:
            return _of_groups(rows, scales, zeros, outer, position, inside, scale_width, F), 1.0
        else:
            if F[3]:
                zero = load_groups(zeros, position, inside, 0, scale_width, F, DEPTH)
                rows -= zero.to(tl.float32)
            scale = scale_of(load_groups(scales, position, inside, 0, scale_width, F, DEPTH), F)
            if F[6]:
                scale *= tl.load(outer)
            if F[4] > 0:
                scale = tl.reshape(scale, (1, position.shape[0]))
            return rows, scale


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))


@triton.jit
def _scores(products, place, position, inside, SCALE: tl.constexpr, CAP: tl.constexpr,
            WINDOW: tl.constexpr):
    """Of queries at ``place``; −Inf of keys that they do not see."""
    scores = products * SCALE
    if CAP > 0:
        scores = CAP * tanh(scores * (1.0 / CAP))
    seen = inside[None, :] & (position[None, :] <= place[:, None])
    if WINDOW > 0:
        seen &= position[None, :] > place[:, None] - WINDOW
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _finite(most):
    """0 for −Inf, the largest of nothing: exp(−Inf − 0) is 0."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def attention_kernel(
    q, lengths, keys, key_scales, key_zeros, key_outer, values, value_scales, value_zeros,
    value_outer, most, total, partial, capacity, key_width, key_scale_size, key_scale_width,
    value_width, value_scale_size, value_scale_width, D,
    K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head of the cache, of HEADS, over one of SPLITS shares of positions.

    K, V: ``Stored``, None of floats. key_scale_size: scales of a head; 0 of one for the tensor.
    WINDOW: how many positions a query sees; 0: all up to its own.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    held = (row < QUERIES)[:, None] & (depth < D)[None, :]
    queries = tl.load(q + (head * QUERIES + row)[:, None] * D + depth[None, :], mask=held,
                      other=0.0).to(tl.float32)
    length = tl.minimum(tl.load(lengths + head // HEADS), capacity)
    place = length - T + row % T
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - T + 1 - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), COLUMNS) * COLUMNS
    begin += split * share
    end = tl.minimum(begin + share, length)
    keys += head * capacity * key_width
    values += head * capacity * value_width
    if K is not None:
        key_scales += head * key_scale_size
        key_zeros += head * key_scale_size
    if V is not None:
        value_scales += head * value_scale_size
        value_zeros += head * value_scale_size
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(begin, end, COLUMNS):
        position = start + tl.arange(0, COLUMNS)
        inside = position < end
        found, factor = _loaded(keys, key_scales, key_zeros, key_outer, position.to(tl.int64),
                                inside, key_width, key_scale_width, K, DEPTH)
        products = _product(queries, tl.trans(found), EXACT) * factor
        scores = _scores(products, place, position, inside, SCALE, CAP, WINDOW)
        higher = tl.maximum(high, tl.max(scores, 1))
        kept = tl.exp2((high - _finite(higher)) * _LOG2_E)
        chances = tl.exp2((scores - _finite(higher)[:, None]) * _LOG2_E)
        found, factor = _loaded(values, value_scales, value_zeros, value_outer,
                                position.to(tl.int64), inside, value_width, value_scale_width, V,
                                DEPTH)
        weight = weight * kept + tl.sum(chances, 1)
        out = out * kept[:, None] + _product(chances * factor, found, EXACT)
        high = higher
    line = (head * SPLITS + split) * QUERIES + row
    tl.store(most + line, high, mask=row < QUERIES)
    tl.store(total + line, weight, mask=row < QUERIES)
    tl.store(partial + line[:, None] * D + depth[None, :], out, mask=held)


@triton.jit
def combine_kernel(most, total, partial, out, QUERIES, D, SPLITS: tl.constexpr,
                   PADDED: tl.constexpr, DEPTH: tl.constexpr):
    """One query: its shares, PADDED in number, weighed and added; 0 where none has a position."""
    head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1)
    split = tl.arange(0, PADDED)
    depth = tl.arange(0, DEPTH)
    line = (head * SPLITS + split) * QUERIES + query
    high = tl.load(most + line, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2((high - _finite(tl.max(high, 0))) * _LOG2_E)
    whole = tl.sum(weight * tl.load(total + line, mask=split < SPLITS, other=0.0), 0)
    parts = tl.load(partial + line[:, None] * D + depth[None, :],
                    mask=(split < SPLITS)[:, None] & (depth < D)[None, :], other=0.0)
    found = tl.sum(parts * weight[:, None], 0)
    found = tl.div_rn(found, tl.zeros((DEPTH,), tl.float32) + tl.where(whole == 0.0, 1.0, whole))
    store_float(out + (head * QUERIES + query) * D + depth, found, depth < D)
