"""How the scale of a group of elements is found.

Corner cases, the same for every format:
- A group that holds NaN or Inf gets scale NaN, and so decodes to NaN as a whole (as torchao does
  for MX). With a tensor scale, or one scale for the tensor, that is the whole tensor.
- An all-zero group: E8M0 scales are 2^-127 (code 0, as OCP's emulators); scales found as amax/max
  are 1.0, also where amax/max underflows to 0; with a tensor scale (NVFP4) they are 0, as in
  TransformerEngine, and an all-zero tensor has tensor scale 1.
- No scale is so large that max·scale overflows float32: FLT_MAX saturates instead of becoming Inf.
- Exponents come from the bits of amax, in float32 (float64 for float64 data): no logarithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import IntegerElement, float32
from scaleprop.formats.grouping import Grouping, is_zero, static_shape
from scaleprop.formats.rounding import nearest, power_of_two_below
from scaleprop.formats.scaled import FLT_MAX, POWER_RULES, ScaledFormat

# What the largest block scale becomes under a tensor scale: E4M3's maximum (TransformerEngine),
# also for UE5M3, which keeps the rest as headroom; 256 under four-over-six, whose scales grow 1.5×.
_TARGETS = {"e4m3": 448.0, "ue5m3": 448.0, "ue5m3x": 448.0}
RMS_RATIO = 2.92247856 / 6.0  # of a normal distribution's best scale for E2M1 to its σ
_MSE_RATIOS = tuple(1.0 - 0.03 * step for step in range(24))


@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of a grouped tensor; each broadcasts against the grouped view, in float32.

    x̂ = value · scale (· tensor_scale), or (code - zero_point) · scale. ``encode``: what data is
    multiplied by before rounding where that is not division by ``scale`` (two levels).
    """

    scale: Tensor
    tensor_scale: Tensor | None = None
    zero_point: Tensor | None = None
    encode: Tensor | None = None

    def normalize(self, grouped: Tensor) -> Tensor:
        """Data in units of the element format, before rounding."""
        if self.encode is not None:
            return grouped * self.encode
        return grouped / self.scale

    def restore(self, values: Tensor) -> Tensor:
        """The inverse, on rounded values (zero point already subtracted)."""
        scaled = values * self.scale
        return scaled if self.tensor_scale is None else scaled * self.tensor_scale


def target(fmt: ScaledFormat) -> float:
    """The largest block scale that the tensor scale aims at."""
    return 256.0 if fmt.rule == "fouroversix" else _TARGETS.get(fmt.scale.name, 1.0)


def find_scales(grouped: Tensor, fmt: ScaledFormat, grouping: Grouping,
                tensor_amax: Tensor | None = None, headroom: float = 1.0) -> Scales:
    """The scales of ``grouped`` (float32 or float64) by the format's rule.

    tensor_amax: a scalar in place of the data's, for the scale of the whole tensor.
    headroom: every amax is taken so many times as large.
    """
    if fmt.zero_point:
        return _find_with_zero_point(grouped, fmt, grouping)
    amax = grouping.reduce(torch.amax, grouped.abs())
    whole = None if tensor_amax is None else tensor_amax.to(torch.float32)
    if headroom != 1.0:
        amax, whole = amax * headroom, None if whole is None else whole * headroom
    if fmt.two_level:
        outer = whole_amax(amax) if whole is None else whole
        return find_two_level(grouped, fmt, grouping, amax, outer)
    amax = amax if whole is None else whole
    if fmt.rule == "mse":
        def error(candidate: Tensor) -> Tensor:
            return squared_error(grouped, Scales(candidate), fmt, grouping)
        return Scales(_search(amax, lambda a: one_level(a, fmt), error, fmt))
    if fmt.rule == "absmean":
        return Scales(_absmean(grouped, amax, fmt, grouping))
    if fmt.rule == "rms":
        return Scales(grouping.stored(_rms(grouped, amax, fmt, grouping)))
    return Scales(grouping.stored(one_level(amax, fmt)))


def one_level(amax: Tensor, fmt: ScaledFormat) -> Tensor:
    """Scales from amax by rules floor, rceil, ceil, even, pow2, exact (also mse's candidates)."""
    if fmt.rule in POWER_RULES or not fmt.scale.has_zero:
        scale = power_scale(amax, fmt)
    else:
        scale = round_scale(amax / fmt.element.max, fmt)
    return finish(scale, amax, fmt)


def finish(scale: Tensor, amax: Tensor, fmt: ScaledFormat) -> Tensor:
    """1.0 for scales of zero where E8M0 is not the format; NaN where amax is not finite."""
    if fmt.scale.has_zero:
        empty = amax == 0 if fmt.rule in (*POWER_RULES, "rms") else scale == 0
        scale = torch.where(empty, 1.0, scale)
    return torch.where(amax < torch.inf, scale, torch.nan).to(torch.float32)


def power_scale(amax: Tensor, fmt: ScaledFormat) -> Tensor:
    """2^e by an OCP-style rule: the floor scale, doubled where amax passes the rule's threshold."""
    item = fmt.element
    smallest = max(fmt.scale.smallest, 2.0**-127)
    bound = math.ldexp(1.0, math.frexp(fmt.scale_bound)[1] - 1)
    scale = (power_of_two_below(amax) * 2.0**-item.emax).clamp(smallest, bound)
    match fmt.rule:
        case "rceil" | "pow2":
            up = amax > scale * item.max
        case "ceil":
            up = amax > scale * 2.0**item.emax
        case "even":
            up = amax >= scale * ((2.0 - 2.0 ** -(item.mantissa_bits + 1)) * 2.0**item.emax)
        case _:
            return scale
    return torch.where(up, scale * 2.0, scale).clamp(max=bound)


def round_scale(scale: Tensor, fmt: ScaledFormat) -> Tensor:
    """Nearest value of the scale format, at most ``fmt.scale_bound``; same dtype."""
    bounded = scale.clamp(max=fmt.scale_bound)
    if scale.dtype == torch.float32 and fmt.scale.name == "f32":
        return bounded
    # not a cast to float16 or bfloat16 and back: Inductor drops such pairs, and the rounding
    return nearest(bounded, fmt.scale)


def _wide_sum(grouped: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """Summed in float64, so that the order does not show."""
    return grouped.sum(dims, keepdim, dtype=torch.float64)


def _absmean(grouped: Tensor, amax: Tensor, fmt: ScaledFormat, grouping: Grouping) -> Tensor:
    mean = _wide_mean(grouped.abs(), grouping)
    return finish(round_scale(mean, fmt), amax, fmt)


def _wide_mean(grouped: Tensor, grouping: Grouping) -> Tensor:
    """Of each group, padding not counted, in float64."""
    if grouping.whole:
        return grouping.reduce(lambda x, dims, keepdim: x.mean(dims, keepdim, dtype=torch.float64),
                               grouped)
    size = grouping.reduce(_wide_sum, grouping.split(torch.ones_like(grouping.join(grouped))))
    return grouping.reduce(_wide_sum, grouped) / size.clamp(min=1.0)


def _rms(grouped: Tensor, amax: Tensor, fmt: ScaledFormat, grouping: Grouping) -> Tensor:
    sigma = _wide_mean(grouped.to(torch.float64).square(), grouping).sqrt()
    low, high = max(fmt.scale.smallest, 2.0**-127), 2.0 ** (math.frexp(fmt.scale_bound)[1] - 1)
    scale = power_of_two_below((sigma * RMS_RATIO).to(torch.float32)).clamp(low, high)
    return finish(scale, amax, fmt)


def whole_amax(amax: Tensor) -> Tensor:
    """The largest entry, a scalar, in float32; 0 of an empty tensor."""
    if any(is_zero(size) for size in amax.shape):
        return amax.new_zeros((), dtype=torch.float32)
    return amax.amax().to(torch.float32)


def tensor_scale_of(amax: Tensor, fmt: ScaledFormat) -> Tensor:
    """amax/(target·max) in float32, the second-level scale; 1 for an all-zero tensor.

    Not below 2^-128, where the encoding scale 1/tensor_scale stops at FLT_MAX; NaN unless finite.
    """
    scale = (amax / (target(fmt) * fmt.element.max)).clamp(min=2.0**-128)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax < torch.inf, scale, torch.nan)


def find_two_level(grouped: Tensor, fmt: ScaledFormat, grouping: Grouping, amax: Tensor,
                   tensor_amax: Tensor) -> Scales:
    """TransformerEngine's order of operations, in float32 whatever the data's dtype.

    S = min(target·max/amax_t, FLT_MAX); block scale = RN(min(amax_b·(S·fl(1/max)), its largest));
    data is multiplied by min(1/(block scale · (1/S)), FLT_MAX). Where amax_t is of other data, as
    a held one, block scales go beyond the target: UE5M3's to 61440, E4M3's not, 448 is its largest.
    """
    item = fmt.element
    top = target(fmt)
    # number / tensor would multiply by a rounded reciprocal
    encode = (torch.full_like(tensor_amax, top * item.max) / tensor_amax).clamp(max=FLT_MAX)
    encode = torch.where((tensor_amax == 0) | (encode == 0), 1.0, encode)
    outer = tensor_scale_of(tensor_amax, fmt)
    decode = 1.0 / encode
    per_amax = encode * float32(1.0 / item.max)
    base = amax.to(torch.float32) * per_amax

    def scales(block_amax: Tensor) -> Tensor:
        if fmt.rule in POWER_RULES or not fmt.scale.has_zero:
            return power_scale(block_amax * encode, fmt)
        return round_scale(block_amax * per_amax, fmt)

    def complete(scale: Tensor) -> Scales:
        return Scales(scale, outer, None, (1.0 / (scale * decode)).clamp(max=FLT_MAX))

    def error(scale: Tensor) -> Tensor:
        return squared_error(grouped, complete(scale), fmt, grouping)

    single = amax.to(torch.float32)
    if fmt.rule == "fouroversix":
        six, four = round_scale(base, fmt), round_scale(base * 1.5, fmt)
        return _in_memory(complete(torch.where(error(four) < error(six), four, six)), grouping)
    if fmt.rule == "mse":
        return _in_memory(complete(_search(single, scales, error, fmt)), grouping)
    return _in_memory(complete(scales(single)), grouping)


def _in_memory(scales: Scales, grouping: Grouping) -> Scales:
    """The same scales, as buffers."""
    assert scales.encode is not None and scales.tensor_scale is not None
    outer = scales.tensor_scale.as_strided((), ())
    return Scales(grouping.stored(scales.scale), outer, None, grouping.stored(scales.encode))


def _search(amax: Tensor, scales: Callable[[Tensor], Tensor], error: Callable[[Tensor], Tensor],
            fmt: ScaledFormat) -> Tensor:
    """The scale of least squared error: amax shrunk in 24 steps; three exponents for E8M0."""
    ratios = (1.0, 0.5, 2.0) if not fmt.scale.has_zero else _MSE_RATIOS
    best = scales(amax)
    least = error(best)
    for ratio in ratios[1:]:
        candidate = scales(amax * ratio)
        loss = error(candidate)
        better = loss < least
        best = torch.where(better, candidate, best)
        least = torch.where(better, loss, least)
    return best


def squared_error(grouped: Tensor, scales: Scales, fmt: ScaledFormat,
                  grouping: Grouping) -> Tensor:
    """Σ(x̂ - x)² of each group, rounding to nearest."""
    restored = scales.restore(nearest(scales.normalize(grouped), fmt.element))
    return grouping.reduce(torch.sum, (restored - grouped).square())


def _find_with_zero_point(grouped: Tensor, fmt: ScaledFormat, grouping: Grouping) -> Scales:
    """scale = (max(x,0) - min(x,0))/levels, zero_point = RNE(-min/scale): ONNX's order."""
    low = grouping.reduce(torch.amin, grouped).clamp(max=0.0)
    high = grouping.reduce(torch.amax, grouped).clamp(min=0.0)
    best = affine(low, high, fmt)
    if fmt.rule != "mse":
        return best
    least = _affine_error(grouped, best, fmt, grouping)
    for ratio in _MSE_RATIOS[1:]:
        candidate = affine(low * ratio, high * ratio, fmt)
        loss = _affine_error(grouped, candidate, fmt, grouping)
        better = loss < least
        best = Scales(torch.where(better, candidate.scale, best.scale),
                      zero_point=torch.where(better, _zero(candidate), _zero(best)))
        least = torch.where(better, loss, least)
    return best


def affine(low: Tensor, high: Tensor, fmt: ScaledFormat) -> Scales:
    """Scale and zero point of the range [low, high], low ≤ 0 ≤ high.

    A range that overflows (as of -FLT_MAX and FLT_MAX) has scale NaN, as one with NaN or Inf.
    """
    assert isinstance(fmt.element, IntegerElement)
    levels = float(fmt.element.levels)
    span = (high - low).to(torch.float32)
    scale = finish(round_scale(span / levels, fmt), span, fmt)
    zero_point = (-low / scale).round().clamp(0.0, levels)
    return Scales(scale, zero_point=torch.where(zero_point.isnan(), 0.0, zero_point))


def _zero(scales: Scales) -> Tensor:
    assert scales.zero_point is not None
    return scales.zero_point


def affine_codes(grouped: Tensor, scales: Scales, fmt: ScaledFormat) -> Tensor:
    """clamp(RNE(x/scale) + zero_point, 0, levels), as floats."""
    assert isinstance(fmt.element, IntegerElement)
    return (scales.normalize(grouped).round() + _zero(scales)).clamp(0, fmt.element.levels)


def _affine_error(grouped: Tensor, scales: Scales, fmt: ScaledFormat,
                  grouping: Grouping) -> Tensor:
    restored = scales.restore(affine_codes(grouped, scales, fmt) - _zero(scales))
    return grouping.reduce(torch.sum, (restored - grouped).square())


def given_scales(parts: Sequence[Tensor], grouped: Tensor, fmt: ScaledFormat,
                 grouping: Grouping) -> Scales:
    """Scales as given: [scale], [scale, zero_point], [scale, tensor_scale] or [tensor_scale].

    With two levels, the tensor scale alone lets the block scales follow the data.

    Raises:
        FormatError: on a wrong number of parts, or a wrong shape.
    """
    if fmt.two_level and len(parts) == 1:
        outer = _shaped(parts[0], (), "tensor scale", fmt).to(torch.float32)
        amax = grouping.reduce(torch.amax, grouped.abs())
        found = find_two_level(grouped, fmt, grouping, amax,
                               outer * (target(fmt) * fmt.element.max))
        return dataclasses.replace(found, tensor_scale=outer)
    if len(parts) != fmt.parts_count - 1:
        kinds = "scale" + ", tensor_scale" * fmt.two_level + ", zero_point" * fmt.zero_point
        raise FormatError(f"format {str(fmt)!r} takes scales=[{kinds}], not {len(parts)} tensors")
    scale = _shaped(parts[0], grouping.scale_shape, "scale", fmt)
    scale = grouping.spread(decoded_scale(scale, fmt))
    if fmt.two_level:
        outer = _shaped(parts[1], (), "tensor scale", fmt).to(torch.float32)
        return Scales(scale, outer, None, (1.0 / (scale * outer)).clamp(max=FLT_MAX))
    if fmt.zero_point:
        zero_point = _shaped(parts[1], grouping.scale_shape, "zero point", fmt)
        return Scales(scale, zero_point=grouping.spread(zero_point.to(torch.float32)))
    return Scales(scale)


def decoded_scale(stored: Tensor, fmt: ScaledFormat) -> Tensor:
    """Stored scales as float32. UE5M3 codes (uint8) are decoded; floats are taken as they are."""
    if stored.dtype == torch.uint8:
        from scaleprop.formats.rounding import decode
        return decode(stored, fmt.scale)
    return stored.to(torch.float32)


def _shaped(part: Tensor, shape: tuple[object, ...], what: str, fmt: ScaledFormat) -> Tensor:
    """``part`` if it has this shape (a single number may have any number of unit axes)."""
    if tuple(part.shape) == tuple(shape):
        return part
    if all(isinstance(n, int) and n == 1 for n in (*part.shape, *shape)):
        return part.reshape(shape)  # type: ignore[arg-type]
    raise FormatError(f"format {str(fmt)!r}: the {what} has shape {static_shape(part.shape)}; "
                      f"for this tensor it must be {static_shape(shape)}")
