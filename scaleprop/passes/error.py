"""How far a quantized tensor is from its source, for the report."""

from __future__ import annotations

import math

import torch

from scaleprop.formats import ScaledTensor

_TOLERANCE = 1e-5  # a value this little beyond the largest one was rounded, not clipped


def error_statistics(x: torch.Tensor, quantized: ScaledTensor) -> dict[str, float | None]:
    """``sqnr_db``, ``saturated`` and ``underflowed`` of ``quantized``, as in ``TensorRecord``.

    x: the source, in the shape of ``quantized``, which was made along its last axis.
    sqnr_db is None for a source of zeros and inf where nothing was lost.
    """
    source = x.detach().float()
    restored = quantized.dequantize(torch.float32)
    error = source - restored
    signal = float(source.double().square().sum())
    noise = float(error.double().square().sum())
    beyond = source.abs() > restored.abs() * (1 + _TOLERANCE)
    element = quantized.format.element
    if quantized.zero_point is None:
        at_edge = quantized.values().abs() >= element.max
    else:
        codes = quantized.codes()
        at_edge = (codes == 0) | (codes == (1 << element.bits) - 1)
    count = max(source.numel(), 1)
    return {
        "sqnr_db": _decibels(signal, noise),
        "saturated": int((beyond & at_edge).sum()) / count,
        "underflowed": int(((source != 0) & (restored == 0)).sum()) / count,
    }


def _decibels(signal: float, noise: float) -> float | None:
    if signal == 0:
        return None
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
