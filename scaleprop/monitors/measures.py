"""How one quantized factor differs from its data: sums in float64."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import torch
from torch import Tensor

from scaleprop.formats.elements import ElementFormat
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import representable
from scaleprop.formats.scaled import PLAIN, ScaledFormat, parse
from scaleprop.formats.scales import Scales, find_scales
from scaleprop.monitors.records import OperandRecord
from scaleprop.recipes.training import Operand

WEIGHTS = ("fprop.w", "w")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A factor as a product was given it.

    x: data, as it is quantized along ``axis``. values, outer: what is multiplied, and the scalar
    that the product is; None where there is none. amax: in place of the data's, or None.
    """

    layer: str
    role: str
    operand: Operand
    axis: int
    x: Tensor
    values: Tensor
    outer: Tensor | None = None
    amax: Tensor | None = None

    @property
    def restored(self) -> Tensor:
        """x̂, float64."""
        found = self.values.to(torch.float64) / self.operand.prescale
        return found if self.outer is None else found * self.outer.to(torch.float64)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight at one measurement. x, x̂, and x̂ in units of its blocks' scales."""

    x: Tensor
    restored: Tensor
    units: Tensor


def measured(seen: Seen, before: Weight | None = None) -> tuple[OperandRecord, Weight | None]:
    """The record of a factor; and what the next one is compared to where it is fprop's weight."""
    x, restored = seen.x.to(torch.float64), seen.restored
    size, error = x.abs(), restored - x
    saturated, exponents, units = 0.0, dict[int, int](), restored
    if seen.operand.format not in PLAIN:
        saturated, exponents, units = _scaled(seen, restored)
    weight = None
    if seen.role in WEIGHTS:
        weight = Weight(seen.x.detach().clone(), restored.to(torch.float32),
                        units.to(torch.bfloat16))  # no element has more bits
    flipped, oscillation = _moved(weight, before)
    empty = x.numel() == 0
    return OperandRecord(
        layer=seen.layer, role=seen.role, format=seen.operand.format,
        amax=0.0 if empty else float(size.max()), rms=_mean(x.square()) ** 0.5,
        underflow=_mean((x != 0) & (restored == 0)), saturated=saturated,
        sqnr_db=sqnr(x, error), bias=_ratio(_mean(error * x.sign()), _mean(size)),
        exponents=exponents, flipped=flipped, oscillation=oscillation), weight


def sqnr(x: Tensor, error: Tensor) -> float:
    """10·log10(Σx²/Σerror²): Inf without error, -Inf without signal, NaN where a sum is."""
    signal, noise = float(x.square().sum()), float(error.square().sum())
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _mean(x: Tensor) -> float:
    return float(x.to(torch.float64).mean()) if x.numel() else 0.0


def _ratio(over: float, under: float) -> float:
    return over / under if under else math.nan if over else 0.0


def _scaled(seen: Seen, restored: Tensor) -> tuple[float, dict[int, int], Tensor]:
    """(share saturated, histogram of exponents, x̂ in units of scales) of a scaled format."""
    fmt = parse(seen.operand.format)
    moved = seen.x.to(torch.float32).movedim(seen.axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape), seen.axis)
    grouped = grouping.split(moved)
    scales = find_scales(grouped, fmt, grouping, seen.amax, seen.operand.headroom)
    peaks = grouping.reduce(torch.amax, grouped.abs())
    unit = _unit(scales)
    scaled = torch.where(unit > 0, scales.normalize(grouped), 0.0)  # by 0, all underflows
    share = _beyond(scaled * seen.operand.prescale, fmt.element, grouping)
    units = grouping.split(restored.movedim(seen.axis, -1)) / unit.clamp(min=2.0**-1022)
    units = grouping.join(units * seen.operand.prescale).movedim(-1, seen.axis)
    return share, exponents_of(unit.expand_as(peaks)[peaks > 0]), _snapped(units, fmt)


def _unit(scales: Scales) -> Tensor:
    """What one unit of an element stands for, float64."""
    scale = scales.scale.to(torch.float64)
    return scale if scales.tensor_scale is None else scale * scales.tensor_scale.to(torch.float64)


def exponents_of(scale: Tensor) -> dict[int, int]:
    """⌊log₂ s⌋ → how many; of those above 0 that are finite."""
    kept = scale[(scale > 0) & scale.isfinite()]
    exponents = torch.frexp(kept).exponent - 1
    return dict(sorted(Counter(exponents.flatten().tolist()).items()))


def _beyond(units: Tensor, element: ElementFormat, grouping: Grouping) -> float:
    """Share of elements further out than the last value, by more than half the last step."""
    grid = representable(element)
    low, high = grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2
    return _mean(grouping.join((units < low) | (units > high)))


def _snapped(units: Tensor, fmt: ScaledFormat) -> Tensor:
    """The element values that ``units`` are, but for rounding in dividing by scales."""
    grid = torch.tensor(representable(fmt.element), dtype=torch.float64, device=units.device)
    return grid[torch.bucketize(units.contiguous(), (grid[1:] + grid[:-1]) / 2)]


def _moved(now: Weight | None, before: Weight | None) -> tuple[float | None, float | None]:
    """(share flipped, oscillation) since ``before``."""
    if now is None or before is None or now.x.shape != before.x.shape:
        return None, None
    travelled = float((now.x.to(torch.float64) - before.x.to(torch.float64)).abs().sum())
    jumped = float((now.restored.to(torch.float64) - before.restored).abs().sum())
    return _mean(now.units != before.units), jumped / travelled if travelled else None


def compared(low: Tensor, high: Tensor) -> tuple[float, float]:
    """(cosine, norm ratio) of two gradients."""
    ours, theirs = low.to(torch.float64).flatten(), high.to(torch.float64).flatten()
    norms = float(ours.norm()), float(theirs.norm())
    product = norms[0] * norms[1]
    return (float(ours @ theirs) / product if product else math.nan,
            norms[0] / norms[1] if norms[1] else math.nan)
