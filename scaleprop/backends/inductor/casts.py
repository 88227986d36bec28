"""``quantize`` in the form that Inductor compiles best; equal, bit for bit, to ``scaleprop.ops``.

``scaleprop.ops.implementations`` fuse as they are. For 8-bit formats with one scale per tensor or
row, which feed oneDNN's linears, three things are spelled differently:

- Scales are written to memory between the pass that finds the range and the pass that rounds. Left
  to itself, Inductor repeats their computation, in scalar code, beside every few elements.
- NaN is found as x ≠ x, or in the comparison that clamps, because Inductor's ``isnan`` runs one
  element at a time.
- Casting to float8 rounds; there is no need to round before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.formats.elements import FloatElement, IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import check_input
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.formats.scales import Scales, affine, find_scales, given_scales, one_level
from scaleprop.formats.tensor import data_dtype
from scaleprop.ops import implementations


def quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
             bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``scaleprop::quantize``: the same arguments, the same parts out."""
    fmt = parse(format)
    mode = parse_rounding(rounding)
    supported = _is_int8(fmt) or _is_fp8(fmt)
    if mode.stochastic or x.dtype == torch.float64 or not supported:
        return implementations.quantize(x, format, axis, rounding, bits, scales)
    check_input(x, axis, mode, bits)
    moved = x.to(torch.float32).movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape))
    found = _scales(moved, fmt, grouping) if scales is None else given_scales(
        scales, moved, fmt, grouping)
    scale = stored(found.scale)
    units = moved / scale
    parts = [grouping.compact(scale).clone()]
    if isinstance(fmt.element, FloatElement):
        return [units.clamp(-fmt.element.max, fmt.element.max).to(fmt.element.storage), *parts]
    assert isinstance(fmt.element, IntegerElement)
    if found.zero_point is None:
        codes = units.round().clamp(-fmt.element.high, fmt.element.high)
        codes = torch.where(codes == codes, codes, 0.0)  # NaN becomes code 0
    else:
        zero_point = stored(found.zero_point)
        codes = units.round() + zero_point
        codes = torch.where(codes > 0.0, codes, 0.0)  # NaN becomes code 0
        codes = codes.clamp(max=float(fmt.element.levels))
        parts.append(grouping.compact(zero_point).to(torch.uint8))
    return [codes.to(data_dtype(fmt)), *parts]


def _scales(x: Tensor, fmt: ScaledFormat, grouping: Grouping) -> Scales:
    """``find_scales``; one range of a whole tensor is found row by row, in the rows' own loop."""
    if fmt.rule != "exact" or fmt.granularity.kind != "tensor" or x.ndim < 2 or x.numel() == 0:
        return find_scales(x, fmt, grouping)
    if fmt.zero_point:
        low, high = x.amin(-1).amin(), x.amax(-1).amax()
        return affine(low.clamp(max=0.0), high.clamp(min=0.0), fmt)
    return Scales(one_level(x.abs().amax(-1).amax(), fmt))


def _is_int8(fmt: ScaledFormat) -> bool:
    """INT8 with float32 scales per tensor or row."""
    return (isinstance(fmt.element, IntegerElement) and fmt.bits == 8 and fmt.element.unit == 1.0
            and fmt.granularity.kind in ("tensor", "row") and fmt.scale.name == "f32"
            and not fmt.two_level)


def _is_fp8(fmt: ScaledFormat) -> bool:
    """E4M3 or E5M2 with float32 scales per tensor or row."""
    return (isinstance(fmt.element, FloatElement) and fmt.element.name in ("e4m3", "e5m2")
            and fmt.granularity.kind in ("tensor", "row") and fmt.scale.name == "f32"
            and not fmt.two_level)


def stored(x: Tensor) -> Tensor:
    """``x`` itself; a compiler writes it to memory here instead of recomputing it at each use."""
    return x.as_strided(x.shape, x.stride())

