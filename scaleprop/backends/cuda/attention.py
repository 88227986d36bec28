"""Launching attention of new queries over a stored cache: shares, tiles, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.backends.cuda.constants import Stored, stored_constants
from scaleprop.backends.cuda.kernels import attention
from scaleprop.backends.cuda.launching import Parts, as_bytes, launch, programs
from scaleprop.errors import FormatError
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import storage_layout

MAX_SPLITS = 32
MAX_QUERIES = 64  # of a sequence's head; each number of them is compiled
MAX_DEPTH = 256
_PROGRAMS = 512  # a few a multiprocessor; by no device's own number, on which sums would depend
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """What becomes of scores before the softmax.

    scale: they are multiplied by it; None: 1/√D. window: how many positions a query sees, its own
    included; 0: all up to its own. cap: c > 0 makes them c·tanh(s/c) (arXiv:2408.00118).
    """

    scale: float | None = None
    window: int = 0
    cap: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 0 or self.cap < 0:
            raise FormatError(f"window {self.window}, cap {self.cap}: 0 or more")


def attend(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Tensor,
    formats: tuple[ScaledFormat | None, ScaledFormat | None], masking: Masking | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale·q·Kᵀ)·V [B, H, T, D] in q's dtype; the T queries are at each sequence's end.

    q: [B, H, T, D] float32, bfloat16 or float16. keys, values: stored parts of [B, G, S, D], G a
    divisor of H, in ``formats``; [x] of floats where that is None. lengths: int32 [B], positions
    that hold something, the new ones included; a query without any gives 0. splits: shares of the
    positions that run at once, 1..32; their number can change the last bits, nothing else does.

    Products are of float32 where q is, else of bfloat16, to which scaled values are rounded unless
    a whole row shares the scale. NaN in values reaches every query of a sequence's head.

    Raises:
        FormatError: for formats, shapes and dtypes that the kernel does not take.
    """
    masking = masking or Masking()
    batch, heads, count, depth = _checked(q, lengths)
    shape = _cache_shape(keys[0], batch, heads, depth)
    padded = max(1 << (depth - 1).bit_length(), 16)
    stored = [_stored(parts, fmt, shape, padded)
              for parts, fmt in zip((keys, values), formats, strict=True)]
    groups, capacity = shape[1], shape[2]
    queries = heads // groups * count
    rows, columns, warps = tile_of(queries, padded, not q.is_cuda or q.dtype != torch.float32)
    whole = batch * groups, programs(queries, rows)
    splits = splits or splits_of(whole[0] * whole[1], capacity, columns)
    if not 1 <= splits <= MAX_SPLITS:
        raise FormatError(f"{splits} splits: 1 to {MAX_SPLITS}")
    partial = torch.empty(whole[0], splits, queries, depth + 2, dtype=torch.float32,
                          device=q.device)
    flat = partial.view(-1)
    size = whole[0] * splits * queries
    most, total, partial = flat[:size], flat[size: 2 * size], flat[2 * size:]
    (key, *key_sizes), (value, *value_sizes) = (_arguments(parts, fmt, shape) for parts, fmt in zip(
        (keys, values), formats, strict=True))
    launch(
        attention.attention_kernel, (whole[0], splits, whole[1]), q.contiguous(), lengths, *key,
        *value, most, total, partial, capacity, *key_sizes, *value_sizes, depth, K=stored[0],
        V=stored[1], HEADS=groups, QUERIES=queries, T=count,
        SCALE=depth**-0.5 if masking.scale is None else masking.scale, CAP=masking.cap,
        WINDOW=masking.window, SPLITS=splits, ROWS=rows, COLUMNS=columns, DEPTH=padded,
        EXACT=q.dtype == torch.float32 or not q.is_cuda,  # the interpreter has no bfloat16
        num_warps=warps)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(attention.combine_kernel, (whole[0], queries), most, total, partial, as_bytes(out),
           queries, depth, SPLITS=splits, PADDED=1 << (splits - 1).bit_length(), DEPTH=padded)
    return out


def tile_of(queries: int, depth: int, cores: bool = True) -> tuple[int, int, int]:
    """Queries and positions of a program, whose sums are held in registers, and warps.

    cores: products of bfloat16; those of float32 hold their factors in registers, too.
    """
    if not cores:
        return 16, 16, 8
    rows = min(max(1 << (queries - 1).bit_length(), 16), 64)
    return rows, 64 if rows * depth <= 4096 else 32, 4


def splits_of(others: int, capacity: int, columns: int) -> int:
    """How many shares fill a device that runs ``others`` programs besides; a tile each at least."""
    return max(min(_PROGRAMS // max(others, 1), programs(capacity, columns), MAX_SPLITS), 1)


def _checked(q: Tensor, lengths: Tensor) -> tuple[int, int, int, int]:
    if q.ndim != 4 or q.dtype not in _FLOATS or not 1 <= q.shape[-1] <= MAX_DEPTH:
        raise FormatError(f"queries are {q.dtype} {list(q.shape)}: pass float32, bfloat16 or "
                          f"float16 [B, H, T, D], D at most {MAX_DEPTH}")
    batch, heads, count, depth = q.shape
    if count > MAX_QUERIES:
        raise FormatError(f"{count} new queries of a head: at most {MAX_QUERIES}; of a prompt, "
                          "attend with torch's scaled_dot_product_attention")
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != (batch,):
        raise FormatError(f"lengths are {lengths.dtype} {list(lengths.shape)}: pass int32 "
                          f"[{batch}], one a sequence")
    return batch, heads, count, depth


def _cache_shape(data: Tensor, batch: int, heads: int, depth: int) -> tuple[int, int, int, int]:
    """[B, G, S, D] of the keys."""
    if data.ndim != 4 or data.shape[0] != batch or heads % max(data.shape[1], 1):
        raise FormatError(f"keys are {list(data.shape)}: store [B, G, S, D] along D, B {batch} and "
                          f"G a divisor of {heads} heads")
    return batch, data.shape[1], data.shape[2], depth


def _stored(parts: Sequence[Tensor], fmt: ScaledFormat | None, shape: tuple[int, ...],
            padded: int) -> Stored | None:
    """The format's constants, where the parts are those of the shape."""
    layout = [(shape, parts[0].dtype)] if fmt is None else storage_layout(fmt, shape)
    name = "floats" if fmt is None else fmt.long_name
    found = [(tuple(part.shape), part.dtype) for part in parts]
    if found != layout or (fmt is None and parts[0].dtype not in _FLOATS):
        raise FormatError(f"a cache of {name} stores {layout}, not {found}")
    if fmt is None:
        return None
    stored = stored_constants(fmt)
    if stored.columns & (stored.columns - 1) and stored.columns < padded:
        raise FormatError(f"no kernel attends over {name}: use groups of 2ⁿ columns")
    return stored


def _arguments(parts: Sequence[Tensor], fmt: ScaledFormat | None,
               shape: tuple[int, ...]) -> tuple[list[Tensor], int, int, int]:
    """[data, scales, zeros, outer], bytes of a row, scales of a head and of a row of groups."""
    if fmt is None:
        data = parts[0].contiguous()
        return [data] * 4, data.shape[-1], 0, 0
    held = Parts.of(parts, fmt)
    width = held.data.shape[-1]
    if held.scales.ndim < 2:
        return [held.data, held.scales, held.zeros, held.outer], width, 0, 0
    size = held.scales.numel() // max(shape[0] * shape[1], 1)
    return [held.data, held.scales, held.zeros, held.outer], width, size, held.scales.shape[-1]
