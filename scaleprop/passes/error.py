"""How far a quantized weight is from its source, measured a few rows at a time.

Measuring costs more than quantizing, so a large weight is sampled: of 2^18 values the SQNR is known
to about 0.02 dB, and only the report reads it.
"""

from __future__ import annotations

import math

import torch

from scaleprop.formats import ScaledTensor, error_statistics

_CHUNK = 1 << 17  # elements: the temporaries of a chunk stay in cache, 3× faster than all at once
_SAMPLE = 1 << 18


def weight_error(x: torch.Tensor, quantized: ScaledTensor) -> dict[str, float]:
    """``sqnr_db``, ``saturated`` and ``underflowed`` of a matrix [N, K] quantized along K.

    As ``formats.error_statistics``, over all rows, or over evenly spaced groups of rows with 2^18
    elements together where x has more.
    """
    tile = quantized.format.granularity.rows
    rows = max(_CHUNK // max(x.shape[-1], 1) // tile, 1) * tile
    signal = noise = saturated = underflowed = 0.0
    groups = list(range(0, x.shape[0], rows))
    stride = max(len(groups) * rows * x.shape[-1] // _SAMPLE, 1)
    count = 0
    for start in groups[::stride]:
        part = x[start : start + rows]
        piece = rows_of(quantized, start, part.shape)
        sqnr, clipped, lost = error_statistics(part, piece)
        energy = float(part.double().square().sum())
        signal += energy
        count += part.numel()
        if energy > 0 and sqnr < math.inf:
            noise += energy / 10 ** (sqnr / 10)
        saturated += clipped * part.numel()
        underflowed += lost * part.numel()
    count = max(count, 1)
    return {
        "sqnr_db": _decibels(signal, noise),
        "saturated": saturated / count,
        "underflowed": underflowed / count,
    }


def rows_of(quantized: ScaledTensor, start: int, shape: torch.Size) -> ScaledTensor:
    """Rows ``start`` to ``start + shape[0]``, a multiple of the tile's height."""
    tile = quantized.format.granularity.rows
    stored = [start // tile, -(-(start + shape[0]) // tile)]

    def cut(part: torch.Tensor, is_data: bool) -> torch.Tensor:
        if is_data:
            return part[start : start + shape[0]]
        per_row = quantized.format.granularity.kind in ("row", "block", "tile")
        return part[stored[0] : stored[1]] if part.ndim and per_row else part

    data, *scales = quantized.parts
    parts = [cut(data, True), *(cut(part, False) for part in scales)]
    return ScaledTensor.from_parts(parts, quantized.format, shape, dtype=quantized.dtype)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
