"""How well a format represents a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import FloatElement, IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.tensor import ScaledTensor, moved_shape, scales_of


def error_statistics(x: Tensor, scaled: ScaledTensor) -> tuple[float, float, float]:
    """(SQNR in dB, share saturated, share underflowed) of ``scaled`` against ``x``.

    SQNR is 10·log10(Σx²/Σ(x-x̂)²), summed in float64: Inf where nothing was lost. Saturated: |x|
    beyond what rounds to the largest value by the format's own rounding. Underflowed: x ≠ 0 but
    x̂ = 0. Shares are of all elements, in [0, 1]; an empty tensor gives (inf, 0, 0).

    Raises:
        FormatError: where ``x`` has another shape.
    """
    if x.shape != scaled.shape:
        raise FormatError(f"x has shape {list(x.shape)}, the quantized tensor "
                          f"{list(scaled.shape)}")
    if x.numel() == 0:
        return math.inf, 0.0, 0.0
    wide = x.detach().to(torch.float64)
    restored = scaled.dequantize(torch.float64)
    signal = float(wide.square().sum())
    noise = float((wide - restored).square().sum())
    if math.isnan(noise):
        sqnr = math.nan
    elif noise == 0:
        sqnr = math.inf
    else:
        sqnr = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    saturated = float(_saturated(wide, scaled).double().mean())
    underflowed = float(((wide != 0) & (restored == 0)).double().mean())
    return sqnr, saturated, underflowed


def in_units(x: Tensor, scaled: ScaledTensor) -> Tensor:
    """x / (scale · tensor_scale) in float64, [..., K] with the quantized axis last; x has the shape
    that ``scaled`` was made from. Zero points are not added.
    """
    grouping, unit, _ = _units(scaled)
    wide = x.detach().to(torch.float64).movedim(scaled.axis, -1)
    return grouping.join(grouping.split(wide) / unit)


def _units(scaled: ScaledTensor) -> tuple[Grouping, Tensor, Tensor | None]:
    """How elements are grouped, and each one's scale and zero point, in the grouped view."""
    fmt = scaled.format
    grouping = Grouping(fmt.granularity, moved_shape(scaled.shape, scaled.axis))
    scales = scales_of(scaled.parts, fmt, grouping, torch.float64)
    unit = scales.scale if scales.tensor_scale is None else scales.scale * scales.tensor_scale
    return grouping, unit.clamp(min=2.0**-1022), scales.zero_point


def _saturated(x: Tensor, scaled: ScaledTensor) -> Tensor:
    """Where x lies further beyond the largest (or smallest) value than half its distance to the
    next smaller one; in the stored layout."""
    fmt = scaled.format
    grouping, unit, zero_point = _units(scaled)
    step = top_step(scaled) / 2
    grouped = grouping.split(x.movedim(scaled.axis, -1)) / unit
    low, high = fmt.element.min, fmt.element.max
    if zero_point is not None and isinstance(fmt.element, IntegerElement):
        grouped = grouped + zero_point
        low, high = 0.0, float(fmt.element.levels)
    beyond = grouped > high + step
    if not isinstance(fmt.element, FloatElement) or fmt.element.signed:
        beyond = beyond | (grouped < low - step)
    return grouping.join(beyond)


def top_step(scaled: ScaledTensor) -> float:
    """Distance from the largest element value to the next smaller one."""
    item = scaled.format.element
    if isinstance(item, IntegerElement):
        return item.unit
    if isinstance(item, FloatElement):
        return 2.0 ** (item.emax - item.fraction_bits)
    return item.max - sorted(item.decode(code) for code in item.codes)[-2]
