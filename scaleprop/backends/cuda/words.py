"""Launching products of few rows of bfloat16 with weights of 4 and 8 bits, decoded in pairs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaleprop.backends.cuda import products
from scaleprop.backends.cuda.constants import Element, Stored, stored_constants
from scaleprop.backends.cuda.kernels import words as kernels
from scaleprop.backends.cuda.kernels.products import sum_kernel
from scaleprop.backends.cuda.launching import Parts, as_bytes, launch, programs
from scaleprop.errors import FormatError
from scaleprop.formats.elements import FloatElement, IntegerElement
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.scales import decoded_scale
from scaleprop.formats.tensor import codes_of

MOST_ROWS = 64
_WORD = 4  # bytes
_SCALES = 2.0**-95, 2.0**9  # with which nothing leaves what bfloat16 holds
_COLUMNS = 64
_BIAS = 127
_OFFSET = 8  # powers of two that factors lack: they could be too large for bfloat16


class Pairs(NamedTuple):
    """How two codes become two of bfloat16, in constants; pairs are the same in both halves.

    bits: of a code. integer: 0..15 with a zero point. left: what a magnitude moves by, size: its
    mask. factor: 2^lift as a pair, or 1 of integers. lift: what its exponent lacks for the bias,
    less ``_OFFSET``. scale_size, scale_left: of scales that are codes; scale_first, scale_second:
    pairs whose product makes up for the bias of both. offset: 2^_OFFSET.
    """

    bits: int
    integer: int
    left: int
    size: int
    factor: int
    lift: int
    scale_size: int
    scale_left: int
    scale_first: int
    scale_second: int
    offset: float


def pairs_of(stored: Stored) -> Pairs:
    """The constants of what ``takes`` says."""
    item, scale = stored.element, stored.item
    if item.integer:
        return Pairs(item.bits, 1, 0, 0, _power(0), 0, 0, 0, 0, 0, 1.0)
    lift = _BIAS - item.bias - _OFFSET
    missing = lift + (0 if scale is None else _BIAS - scale.bias)
    return Pairs(
        item.bits, 0, 7 - item.fraction, _pair(_magnitudes(item) << (7 - item.fraction)),
        _power(lift), lift, 0 if scale is None else _pair(_magnitudes(scale)),
        0 if scale is None else 7 - scale.fraction, _power(missing // 2),
        _power(missing - missing // 2), 2.0**_OFFSET)


def _magnitudes(item: Element) -> int:
    """All bits of a code but the sign."""
    return (1 << (item.bits - item.signed)) - 1


def _power(exponent: int) -> int:
    """2^exponent."""
    return _pair((exponent + _BIAS) << 7)


def _pair(bits: int) -> int:
    """The same in both halves, as a signed integer."""
    both = bits | bits << 16
    return both - (1 << 32) if both >> 31 else both


def takes(fmt: ScaledFormat, k: int) -> bool:
    """Whether weights of this format, [N, k], are decoded in pairs, if ``is_plain``: FP4 and FP8
    with signs, INT4; scales of rows, tensors, or groups that steps and words divide."""
    item = fmt.element
    if isinstance(item, FloatElement):
        known = item.signed and item.bits in (4, 8) and item.has_zero
    else:
        known = isinstance(item, IntegerElement) and item.bits == 4 and item.unit == 1.0
    columns = 0 if fmt.block is None else fmt.block[1]
    if not known or fmt.granularity.kind == "channel" or columns & (columns - 1):
        return False
    try:
        at = _place(fmt, k)
    except FormatError:  # what products refuse, these do
        return False
    folds = at != products.FOLDED or isinstance(item, FloatElement)
    steps = columns == 0 or columns >= (8 if at == products.FOLDED else 32)
    bounded = columns <= 256 and not (fmt.zero_point and columns == 0)
    return folds and steps and bounded and k % (32 // item.bits) == 0


def _place(fmt: ScaledFormat, k: int) -> int:
    """Where scales come in, as in other products."""
    return products.way_of(torch.bfloat16, fmt, k).w_at


def is_plain(parts: Sequence[Tensor], fmt: ScaledFormat, k: int) -> bool:
    """Whether stored weights can be decoded so: no codes of NaN or Inf, and where scales of groups
    are multiplied in, these within 2^-95 to 2^9 but for groups of zeros. A look at every code."""
    item = fmt.element
    if isinstance(item, FloatElement) and item.bits == 8 and parts[0].numel() \
            and int((parts[0].view(torch.uint8) & 0x7F).max()) > item.max_code:
        return False
    if _place(fmt, k) != products.FOLDED:
        return True
    scale, (low, high) = decoded_scale(parts[1], fmt), _SCALES
    within = (scale <= high) & ((scale >= low) | _are_zeros(parts, fmt))
    return bool(within.all())


def _are_zeros(parts: Sequence[Tensor], fmt: ScaledFormat) -> Tensor:
    """Of groups, like their scales."""
    assert fmt.block is not None
    rows, columns = fmt.block
    groups = parts[1].shape[-1]
    codes = codes_of(parts[0], fmt, groups * columns).view(torch.uint8)
    size = (codes & ((1 << (fmt.bits - 1)) - 1)).reshape(len(codes), groups, columns).amax(-1)
    size = torch.nn.functional.pad(size, (0, 0, 0, -len(size) % rows))
    return size.reshape(-1, rows, groups).amax(1) == 0


def multiplies(x: Tensor, w: Sequence[Tensor]) -> bool:
    """Whether ``multiply`` takes so many rows, and weights that lie so in memory."""
    return (x.dtype == torch.bfloat16 and math.prod(x.shape[:-1]) <= MOST_ROWS
            and w[0].shape[-1] % _WORD == 0 and w[0].storage_offset() % _WORD == 0)


def multiply(
    x: Tensor, w: Sequence[Tensor], bias: Tensor | None, fmt: ScaledFormat, k: int,
    dtype: torch.dtype, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """y[..., n] = Σ_k x[..., k]·ŵ[n, k] (+ bias[n]), in ``dtype``, of at most 64 rows of bfloat16.

    w: stored parts of what ``takes`` and ``is_plain`` say. Sums are float32's, of exact values;
    then each of scales and bias is rounded once.

    Raises:
        FormatError: for formats, dtypes and sizes that these are not for.
    """
    if not takes(fmt, k) or not multiplies(x, w):
        raise FormatError(f"no kernel decodes {fmt.long_name!r} in pairs, times {list(x.shape)} of "
                          f"{x.dtype}")
    left, right = products.plain(x, k), Parts.of(w, fmt)
    m, n = left.data.shape[0], right.data.shape[0]
    stored, at = stored_constants(fmt), _place(fmt, k)
    data = right.data.view(torch.int32)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not out.numel():  # what is beyond the last row is read from it
        return out.reshape(*x.shape[:-1], n)
    count = products.splits_for(m, n, k, _COLUMNS, x.device) if splits is None else splits
    final = as_bytes(out)
    target = final if count == 1 else torch.empty(count, m, n, device=x.device)
    added = data if bias is None else bias.contiguous()
    run(stored, at, (left.data, data, right), added, target, (m, n, k), count, bias is not None)
    if count > 1:
        rows, columns = products.SUM_TILE
        launch(sum_kernel, (programs(m, rows), programs(n, columns)), target, *left[1:],
               right.scales, right.outer, data, added, final, m, n, X=None, W=stored,
               X_AT=products.PLAIN, W_AT=at, DOT=tl.float32, BIAS=bias is not None, SPLITS=count,
               ROWS=rows, COLUMNS=columns)
    return out.reshape(*x.shape[:-1], n)


def run(stored: Stored, at: int, factors: tuple[Tensor, Tensor, Parts], added: Tensor,
        target: Tensor, sizes: tuple[int, int, int], count: int, bias: bool) -> None:
    """One launch; partial sums where there are several ranges of K."""
    x, data, w = factors
    m, n, k = sizes

    def grid(meta: Mapping[str, Any]) -> tuple[int, int]:
        return programs(m, meta["ROWS"]) * programs(n, meta["COLUMNS"]), count

    fixed = products.interpreted() or torch.are_deterministic_algorithms_enabled()
    bucket = products.bucket_of(m)
    depth = max(config.kwargs["DEPTH"] for config in fitted(bucket, stored, at))
    width = w.scales.shape[-1] if stored.columns else 1
    even = k % depth == 0  # of any tile: sizes are powers of two
    launch(kernel_of(bucket, stored, at, fixed), grid, x, data, w.scales, w.zeros, w.outer, added,
           target, m, n, k, x.stride(0), data.stride(0), width,
           products.key_of(bucket, stored, even), W=stored, P=pairs_of(stored), W_AT=at,
           NATIVE=not products.interpreted(), EVEN=even, BIAS=bias, SPLITS=count)


def tiles_for(bucket: int) -> Iterator[triton.Config]:
    """Tiles to try for so many rows; the first is taken where nothing is tried."""
    rows = max(bucket, 8)
    for columns, depth, warps, stages in ((64, 128, 4, 4), (128, 128, 4, 4), (64, 256, 4, 4),
                                          (64, 128, 4, 6), (128, 256, 8, 3)):
        yield products.config_of(rows, columns, depth, warps, stages)


@functools.cache
def fitted(bucket: int, stored: Stored, at: int) -> list[triton.Config]:
    """``tiles_for``, a step of which shares a scale where scales come in after each part."""
    found: dict[str, triton.Config] = {}
    for config in tiles_for(bucket):
        rows, columns, depth = (config.kwargs[side] for side in ("ROWS", "COLUMNS", "DEPTH"))
        depth = stored.columns if at == products.PART else max(depth, stored.columns)
        each = products.config_of(rows, columns, depth, config.num_warps, config.num_stages)
        found.setdefault(str(each), each)
    return list(found.values())


@functools.cache
def kernel_of(bucket: int, stored: Stored, at: int, fixed: bool) -> Any:
    """As ``products.kernel_of``."""
    configs = fitted(bucket, stored, at)
    return triton.autotune(configs[:1] if fixed else configs, cache_results=True,
                           key=["N", "K", "SPLITS", "BIAS", "EVEN", "key"])(kernels.words_kernel)
