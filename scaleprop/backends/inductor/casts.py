"""Casts in the form that Inductor compiles best; equal, bit for bit, to ``scaleprop.ops``.

Formats round by float arithmetic, which vectorises. What is added here:

- Scales are written to memory, one small tensor, between the pass that finds amax and the pass that
  rounds. Left to itself, Inductor repeats the whole scale computation, in scalar code, beside every
  few elements (measured by ``benchmarks/casts.py``).
- Where scales are powers of two, data is multiplied by their reciprocals, which are exact.
- NaN is found as x ≠ x, because Inductor's ``isnan`` runs one element at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import check_input
from scaleprop.formats.rounding import has_nan, nearest, parse_rounding
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat, parse
from scaleprop.formats.scales import Scales, affine, find_scales, given_scales, one_level
from scaleprop.formats.tensor import data_dtype
from scaleprop.ops import implementations


def fake_quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                  bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> Tensor:
    """``scaleprop::fake_quantize``: the same arguments, the same bits out."""
    fmt = parse(format)
    mode = parse_rounding(rounding)
    if mode.stochastic or x.dtype == torch.float64 or fmt.granularity.kind != "block" \
            or fmt.zero_point:
        return implementations.fake_quantize(x, format, axis, rounding, bits, scales)
    check_input(x, axis, mode, bits)
    moved = x.to(torch.float32).movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape))
    grouped = grouping.split(moved)
    if scales is None:
        found = _stored_scales(find_scales(grouped, fmt, grouping), fmt)
    else:
        found = _stored_scales(given_scales(scales, grouped, fmt, grouping), fmt)
    units = found.normalize(grouped)
    if scales is not None and not has_nan(fmt.element):
        units = torch.where(units.isnan(), 0.0, units)
    restored = found.restore(nearest(units, fmt.element))
    return grouping.join(restored).to(x.dtype).movedim(-1, axis)


def quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
             bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``scaleprop::quantize``: the same arguments, the same parts out."""
    fmt = parse(format)
    mode = parse_rounding(rounding)
    if mode.stochastic or x.dtype == torch.float64 or not _is_int8(fmt):
        return implementations.quantize(x, format, axis, rounding, bits, scales)
    check_input(x, axis, mode, bits)
    assert isinstance(fmt.element, IntegerElement)
    moved = x.to(torch.float32).movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape))
    found = _int8_scales(moved, fmt, grouping) if scales is None else given_scales(
        scales, moved, fmt, grouping)
    scale = stored(found.scale)
    steps = (moved / scale).round()
    parts = [grouping.compact(scale).clone()]
    if found.zero_point is None:
        codes = steps.clamp(-fmt.element.high, fmt.element.high)
    else:
        zero_point = stored(found.zero_point)
        codes = (steps + zero_point).clamp(0.0, float(fmt.element.levels))
        parts.append(grouping.compact(zero_point).to(torch.uint8))
    codes = torch.where(codes == codes, codes, 0.0)  # NaN becomes code 0
    return [codes.to(data_dtype(fmt)), *parts]


def _int8_scales(x: Tensor, fmt: ScaledFormat, grouping: Grouping) -> Scales:
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
            and fmt.granularity.kind in ("tensor", "row") and fmt.scale.name == "f32")


def stored(x: Tensor) -> Tensor:
    """``x`` itself; a compiler writes it to memory here instead of recomputing it at each use."""
    return x.as_strided(x.shape, x.stride())


def _stored_scales(scales: Scales, fmt: ScaledFormat) -> Scales:
    scale = stored(scales.scale)
    if scales.encode is not None:
        return dataclasses.replace(scales, scale=scale, encode=stored(scales.encode))
    if fmt.rule in POWER_RULES and not fmt.two_level:
        return dataclasses.replace(scales, scale=scale, encode=stored(1.0 / scale))
    return dataclasses.replace(scales, scale=scale)
