"""Gradient estimators: what ∂L/∂x is, given ∂L/∂x̂ of a quantizer x → x̂ whose own slope is zero.

Pure functions on tensors without autograd, traceable, to be put into joint graphs. With u = x/scale
(the very scale that the quantizer finds, or was given), Q rounding to the element's grid, g = ∂L/∂x̂
and f' the estimate of Q':

| name            | ∂L/∂x                                                                          |
|-----------------|--------------------------------------------------------------------------------|
| `ste`           | g                                                                              |
| `clipped`       | g·1[min ≤ u ≤ max]                                                             |
| `clipped-open`  | g·1[min < u < max], Quartet's mask (arXiv:2505.14669)                          |
| `absmax`        | clipped; at |x| = amax also sign(x)·∂d/∂amax·Σᵢ gᵢ(Q(uᵢ) - uᵢ·1[in range])     |
| `absmax-ste`    | the same, straight through the floor of scales that are powers of two, too     |
| `dge:k`         | g·min(|z|^(1/k-1)/k, 3)/mean: its mean over an interval of the grid is 1       |
| `dge-clipped:k` | the same without the division, as published: its mean is 0.593 at k = 5        |
| `tanh:c`        | g·(1 - tanh²(x/c)): c·tanh(x/c) is quantized instead of x                      |

`absmax` (R. Hu et al., arXiv:2509.17791; x̂ = d·Q(x/d), d = amax/max). Choices: elements that tie
for the amax share its gradient equally, as ``torch.amax`` has it; a scale is rounded straight
through (slope 1) to a float format, but has slope 0 where it is rounded to a power of two, where it
stopped at a bound, and where it or its amax was given; the scale of the whole tensor in two-level
formats is a constant; scales that were searched for (mse, four-over-six) grow with the amax, the
winner held. Q is to nearest, whatever the rounding forward: stochastic rounding makes the expected
sum 0.

DGE (R. Wang et al., arXiv:2501.17116): z runs from -1 at one end of an interval of the grid over 0
at the boundary where rounding changes to 1 at the other. Where boundaries are not in the middle
(logarithmic codebooks) each side has its own. Both sides of the range end in slope 0.

`tanh` is the soft clipping of 4-bit CNN training (S. Tathe, arXiv:2603.13931, c = 3).

NaN is in range: `ste` and `clipped` pass g; a group with NaN or Inf, whose x̂ is NaN as a whole, has
gradient NaN by `absmax` and `dge`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats.elements import CodebookElement, ElementFormat, FloatElement, IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import check_input
from scaleprop.formats.rounding import Rounding, nearest, power_below
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat, parse
from scaleprop.formats.scales import Scales, find_scales, given_scales, target

DGE_CLIP = 3.0  # arXiv:2501.17116


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What is done to ``x`` (float32 or float64, grouped): format, groups, scales if given; the
    rest as in ``operands.quantize_operand``."""

    x: Tensor
    fmt: ScaledFormat
    grouping: Grouping
    given: Sequence[Tensor] | None
    tensor_amax: Tensor | None = None
    headroom: float = 1.0
    prescale: float = 1.0

    def scales(self) -> Scales:
        """As ``quantize`` finds or is given them."""
        if self.given is not None:
            return given_scales(self.given, self.x, self.fmt, self.grouping)
        return find_scales(self.x, self.fmt, self.grouping, self.tensor_amax, self.headroom)

    def units(self, scales: Scales) -> Tensor:
        """u, what is rounded."""
        units = scales.normalize(self.x)
        return units if self.prescale == 1.0 else units * self.prescale

    def ends(self, scales: Scales) -> tuple[Tensor | float, Tensor | float]:
        """The range of u = x/scale beyond which codes saturate."""
        item = self.fmt.element
        if scales.zero_point is None:
            return item.min, item.max
        assert isinstance(item, IntegerElement)
        return -scales.zero_point, item.levels - scales.zero_point


Backward: TypeAlias = Callable[[Tensor, Quantizer, float], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """A named estimator. ``backward(gradient, quantizer, number)`` is ∂L/∂x, all grouped;
    ``forward(x, number)`` is quantized instead of x. number: of a name such as ``dge:5``; what it
    is unless stated, and the smallest that makes sense (exclusive for 0); none: no such number."""

    name: str
    backward: Backward
    forward: Callable[[Tensor, float], Tensor] | None = None
    number: float | None = None
    least: float = 0.0

    def takes(self, number: float) -> bool:
        """Whether ``number`` makes sense."""
        return math.isfinite(number) and number >= self.least and number > 0


def _ste(gradient: Tensor, quantizer: Quantizer, _: float) -> Tensor:
    return gradient


def _clipped(gradient: Tensor, quantizer: Quantizer, _: float) -> Tensor:
    scales = quantizer.scales()
    low, high = quantizer.ends(scales)
    units = quantizer.units(scales)
    return gradient * (~((units < low) | (units > high))).to(gradient.dtype)


def _clipped_open(gradient: Tensor, quantizer: Quantizer, _: float) -> Tensor:
    scales = quantizer.scales()
    low, high = quantizer.ends(scales)
    units = quantizer.units(scales)
    return gradient * (~((units <= low) | (units >= high))).to(gradient.dtype)


def _absmax(gradient: Tensor, quantizer: Quantizer, through: bool) -> Tensor:
    """∂L/∂x_j = g_j·1[in range] + share_j·sign(x_j)·∂d/∂amax·Σᵢ gᵢ(Q(uᵢ) - uᵢ·1[in range])."""
    fmt, grouping, x = quantizer.fmt, quantizer.grouping, quantizer.x
    check_absmax(fmt)
    scales = quantizer.scales()
    units = quantizer.units(scales)
    outside = (units < fmt.element.min) | (units > fmt.element.max)
    size = x.abs()
    amax = grouping.reduce(torch.amax, size)
    error = nearest(units, fmt.element) - torch.where(outside, 0.0, units)
    total = grouping.reduce(torch.sum, gradient * error) * (1.0 / quantizer.prescale)
    largest = (size == amax).to(gradient.dtype)
    share = largest * torch.sign(x) / grouping.reduce(torch.sum, largest)
    slope = _scale_slope(scales, amax, quantizer, through)
    return gradient * (~outside).to(gradient.dtype) + share * (slope * total)


def check_absmax(format: str | ScaledFormat) -> None:
    """Raise ``ConfigError`` for a format whose scales are found otherwise."""
    fmt = parse(format)
    if fmt.zero_point or fmt.rule in ("absmean", "rms"):
        raise ConfigError(f"estimator 'absmax' is for scales that follow amax, which those of "
                          f"{str(fmt)!r} do not: use 'clipped'")


def _scale_slope(scales: Scales, amax: Tensor, quantizer: Quantizer, through: bool) -> Tensor:
    """∂d/∂amax of each group's scale d (both levels); NaN where d is, 0 where it is given."""
    fmt, whole = quantizer.fmt, quantizer.tensor_amax
    if quantizer.given is not None or (whole is not None and not fmt.two_level):
        return torch.zeros_like(amax)
    scale = scales.scale if scales.tensor_scale is None else scales.scale * scales.tensor_scale
    ratio = torch.where(amax == 0, 0.0, scale / amax)
    if fmt.rule in POWER_RULES or not fmt.scale.has_zero:
        return ratio if through else ratio * 0.0
    if fmt.rule != "exact":
        return ratio
    exact = quantizer.headroom / fmt.element.max
    if fmt.two_level:
        if whole is None:
            return ratio * 0.0 + exact
        stopped = amax > whole * (fmt.scale_bound / target(fmt))  # beyond the largest block scale
        return torch.where(stopped, 0.0, ratio * 0.0 + exact)
    fixed = (amax * exact > fmt.scale_bound) | (ratio > 2.0 * exact)  # at a bound; 1.0 for 0
    return torch.where(fixed, 0.0, ratio * 0.0 + exact)


def dge_mean(k: float, clip: float = DGE_CLIP) -> float:
    """The mean over an interval of min(|z|^(1/k-1)/k, clip): 1 without a clip, 0.593 for 5 and 3.

    The clip is reached at z₀ = (k·clip)^(-k/(k-1)); the mean is clip·z₀ + 1 - z₀^(1/k).
    """
    if k == 1.0:
        return min(1.0, clip)
    edge = (k * clip) ** (-k / (k - 1.0))
    return clip * edge + 1.0 - edge ** (1.0 / k)


def _dge_clipped(gradient: Tensor, quantizer: Quantizer, k: float) -> Tensor:
    scales = quantizer.scales()
    low, high = quantizer.ends(scales)
    units = quantizer.units(scales)
    outside = (units < low) | (units > high)
    z = distance(torch.where(outside, 0.0, units), quantizer.fmt.element)
    if k == 1.0:
        return gradient * torch.where(outside, 0.0, torch.where(z.isnan(), z, 1.0))
    edge = max((k * DGE_CLIP) ** (-k / (k - 1.0)), 2.0**-126)
    slope = torch.exp(torch.log(z.clamp(min=edge)) * (1.0 / k - 1.0)) / k  # faster than a power
    return gradient * torch.where(outside, 0.0, slope)


def _dge(gradient: Tensor, quantizer: Quantizer, k: float) -> Tensor:
    return _dge_clipped(gradient, quantizer, k) * (1.0 / dge_mean(k))


def distance(units: Tensor, element: ElementFormat) -> Tensor:
    """|z| in [0, 1] of values in the element's range, NaN of NaN: 0 at the boundary, where rounding
    to nearest changes, 1 at the ends of the interval between two neighbours of the grid."""
    if isinstance(element, CodebookElement):
        return _codebook_distance(units, element)
    if isinstance(element, IntegerElement):
        steps = units / element.unit
    else:
        assert isinstance(element, FloatElement)
        power = power_below(units, element)
        steps = units.abs() / (power * 2.0**-element.fraction_bits)
    return ((steps - steps.floor()) * 2.0 - 1.0).abs()


def _codebook_distance(units: Tensor, element: CodebookElement) -> Tensor:
    """Each side of each boundary b from a to b, and from b to c, is 1 long."""
    values = element.values
    z = torch.zeros_like(units)
    for (boundary, _), below, above in zip(element.boundaries, values, values[1:], strict=False):
        left, right = (boundary - units) / (boundary - below), (units - boundary) / (
            above - boundary)
        z = torch.where(units >= below, torch.where(units < boundary, left, right), z)
    return torch.where(units.isnan(), units, z.clamp(max=1.0))


def _soft(x: Tensor, c: float) -> Tensor:
    return torch.tanh(x * (1.0 / c)) * c


def _tanh(gradient: Tensor, quantizer: Quantizer, c: float) -> Tensor:
    bent = torch.tanh(quantizer.x * (1.0 / c))
    return gradient * (1.0 - bent * bent)


ESTIMATORS: Mapping[str, Estimator] = {literal.name: literal for literal in (
    Estimator(name="ste", backward=_ste),
    Estimator(name="clipped", backward=_clipped),
    Estimator(name="clipped-open", backward=_clipped_open),
    Estimator(name="absmax", backward=lambda g, q, _: _absmax(g, q, False)),
    Estimator(name="absmax-ste", backward=lambda g, q, _: _absmax(g, q, True)),
    Estimator(name="dge", backward=_dge, number=5.0, least=1.0),
    Estimator(name="dge-clipped", backward=_dge_clipped, number=5.0, least=1.0),
    Estimator(name="tanh", backward=_tanh, forward=_soft, number=3.0),
)}


def parse_estimator(name: str) -> tuple[Estimator, float]:
    """The estimator of a name such as ``dge`` or ``dge:5``, and its number.

    Raises:
        ConfigError: unknown, with close matches; a number that it does not take.
    """
    stem, colon, text = name.partition(":")
    found = ESTIMATORS.get(stem)
    if found is None:
        close = difflib.get_close_matches(stem, ESTIMATORS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"unknown estimator {name!r}: {hint}Known: {', '.join(ESTIMATORS)}; with "
                          "a number: dge:5, dge-clipped:5, tanh:3")
    if not colon:
        return found, found.number or 0.0
    if found.number is None:
        raise ConfigError(f"estimator {name!r}: {stem} takes no number; write {stem!r}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not found.takes(number):
        least = f"at least {found.least:g}" if found.least else "above 0"
        raise ConfigError(f"estimator {name!r}: the number after the colon is finite and {least}, "
                          f"as in '{stem}:{found.number:g}'")
    return found, number


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _check(x: Tensor, axis: int) -> None:
    check_input(x, axis, Rounding("nearest"), None)


def forward(name: str, x: Tensor, format: str | ScaledFormat, axis: int = -1) -> Tensor:
    """What is quantized instead of ``x``, in its shape and dtype; ``x`` itself for all but tanh.

    Raises:
        ConfigError: unknown estimator. FormatError: unknown format, dtype or axis.
    """
    found, number = parse_estimator(name)
    parse(format)
    _check(x, axis)
    return x if found.forward is None else found.forward(_wide(x), number).to(x.dtype)


def backward(name: str, gradient: Tensor, x: Tensor, format: str | ScaledFormat, axis: int = -1,
             scales: Sequence[Tensor] | None = None, tensor_amax: Tensor | None = None,
             headroom: float = 1.0, prescale: float = 1.0) -> Tensor:
    """∂L/∂x, in the shape and dtype of ``gradient`` = ∂L/∂x̂ (that of x̂, so of ``x``).

    x, format, axis, scales: what ``quantize`` was called with; for tanh, x before ``forward``.
    tensor_amax, headroom, prescale: what ``operands.quantize_operand`` was, instead of scales.

    Raises:
        ConfigError: unknown estimator, or one that does not go with the format.
        FormatError: unknown format, dtype, axis; a gradient of another shape.
    """
    found, number = parse_estimator(name)
    fmt = parse(format)
    _check(x, axis)
    if tuple(gradient.shape) != tuple(x.shape):
        raise FormatError(f"the gradient has shape {list(gradient.shape)}, x has {list(x.shape)}: "
                          "an estimator takes the gradient of what was quantized")
    moved = _wide(x).movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape), axis)
    quantizer = Quantizer(grouping.split(moved), fmt, grouping, scales, tensor_amax, headroom,
                          prescale)
    grouped = grouping.split(gradient.to(moved.dtype).movedim(axis, -1))
    result = found.backward(grouped, quantizer, number)
    return grouping.join(result).to(gradient.dtype).movedim(-1, axis)
