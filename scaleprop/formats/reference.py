"""The same arithmetic one number at a time, in exact fractions: slow, obvious, what tests trust.

Nothing here uses torch or floats' rounding: values are Python floats, every step is a ``Fraction``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from scaleprop.errors import FormatError
from scaleprop.formats.elements import (
    CodebookElement,
    ElementFormat,
    FloatElement,
    IntegerElement,
)
from scaleprop.formats.rounding import Rounding
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat

NEAREST = Rounding("nearest")


def floor_log2(x: Fraction) -> int:
    """⌊log2 x⌋ of x > 0."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def ceil_log2(x: Fraction) -> int:
    """⌈log2 x⌉ of x > 0."""
    below = floor_log2(x)
    return below if Fraction(2) ** below == x else below + 1


def round_half_even(x: Fraction) -> int:
    """Nearest integer to x ≥ 0, ties to even."""
    below = math.floor(x)
    rest = x - below
    return below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))


def goes_up(delta: Fraction, rounding: Rounding, bits: int, odd: bool) -> bool:
    """Whether lo + delta·ulp rounds up; ``odd``: whether lo's code is odd."""
    half = Fraction(1, 2)
    scaled = delta * 2**rounding.bits
    top = 2**rounding.bits
    match rounding.mode:
        case "nearest":
            return delta > half or (delta == half and odd)
        case "stochastic":
            return round_half_even(scaled) + bits >= top
        case "stochastic_odd":
            below = math.floor(scaled)
            up = scaled - below > half or (scaled - below == half and below % 2 == 0)
            return below + up + bits >= top
        case "stochastic_fast":
            return scaled + bits + half >= top
        case _:
            return math.floor(scaled) + bits >= top


def round_value(x: float, item: ElementFormat, rounding: Rounding = NEAREST,
                bits: int = 0) -> float:
    """``x`` on the format's grid: saturated, sign of zero kept, NaN kept."""
    if math.isnan(x):
        return x
    if isinstance(item, CodebookElement):
        return _round_codebook(x, item, rounding, bits)
    if x > item.max or x < item.min:
        return item.max if x > item.max else item.min
    size = Fraction(abs(x))
    if isinstance(item, IntegerElement):
        ulp = Fraction(item.unit)
    else:
        assert isinstance(item, FloatElement)
        exponent = item.emin if size == 0 else max(floor_log2(size), item.emin)
        ulp = Fraction(2) ** (exponent - item.fraction_bits)
    steps = math.floor(size / ulp)
    steps += goes_up(size / ulp - steps, rounding, bits, steps % 2 == 1)
    return math.copysign(min(float(steps * ulp), item.max), x)


def _round_codebook(x: float, item: CodebookElement, rounding: Rounding, bits: int) -> float:
    if not item.min < x < item.max:
        return item.max if x >= item.max else item.min
    index = max(i for i, value in enumerate(item.values) if value <= x)
    low, high = Fraction(item.values[index]), Fraction(item.values[index + 1])
    delta = (Fraction(x) - low) / (high - low)
    if rounding.mode == "nearest":
        boundary, even = item.boundaries[index]
        up = x > boundary or (x == boundary and even)
    else:
        up = goes_up(delta, rounding, bits, index % 2 == 1)
    return item.values[index + up]


def scale_of(block: Sequence[float], fmt: ScaledFormat) -> float:
    """The scale of one group of float32 values, by any rule of one level that is not a search.

    Raises:
        FormatError: for two-level formats, zero points and searches.
    """
    if fmt.two_level or fmt.zero_point or fmt.rule not in (*POWER_RULES, "exact"):
        raise FormatError(f"the scalar reference has no scale rule for {str(fmt)!r}")
    if not all(math.isfinite(value) for value in block):
        return math.nan
    amax = max((Fraction(abs(value)) for value in block), default=Fraction(0))
    largest = Fraction(fmt.element.max)
    limit = min(Fraction(fmt.scale.max), (2 - Fraction(1, 2**23)) * 2**127 / largest)
    if fmt.rule == "exact":
        scale = round_value(float_at_most(min(amax / largest, limit)), fmt.scale)
        while Fraction(scale) > limit:
            scale = math.nextafter(scale, 0.0)
            scale = float(round_toward_zero(Fraction(scale), fmt.scale))
        return scale or 1.0
    if amax == 0:
        return fmt.scale.smallest if not fmt.scale.has_zero else 1.0
    exponent = _exponent(amax, fmt)
    lowest = max(floor_log2(Fraction(fmt.scale.smallest)), -127)
    return math.ldexp(1.0, min(max(exponent, lowest), floor_log2(limit)))


def float_at_most(x: Fraction) -> float:
    """A float64 that rounds to float32 or narrower as ``x`` does: x itself, or odd in its last
    place (rounding to odd makes the second rounding harmless)."""
    if x == 0:
        return 0.0
    ulp = Fraction(2) ** (max(floor_log2(x), -1022) - 52)
    steps = math.floor(x / ulp)
    exact = steps * ulp == x
    return float((steps if exact or steps % 2 == 1 else steps + 1) * ulp)


def round_toward_zero(x: Fraction, item: FloatElement) -> Fraction:
    """The largest value of the format that is at most ``x`` > 0."""
    ulp = Fraction(2) ** (max(floor_log2(x), item.emin) - item.fraction_bits)
    return math.floor(x / ulp) * ulp


def _exponent(amax: Fraction, fmt: ScaledFormat) -> int:
    """The rule's exponent before it is clamped."""
    item = fmt.element
    match fmt.rule:
        case "floor":
            return floor_log2(amax) - item.emax
        case "ceil":
            return ceil_log2(amax) - item.emax
        case "even":
            ulp = Fraction(2) ** (floor_log2(amax) - item.mantissa_bits)
            rounded = math.floor(amax / ulp + Fraction(1, 2)) * ulp
            return floor_log2(rounded) - item.emax
        case _:
            return ceil_log2(amax / Fraction(item.max))


def encode_value(value: float, item: ElementFormat) -> int:
    """The code whose value is ``value``, by searching all of them; NaN: the format's NaN code.

    Raises:
        FormatError: where there is none.
    """
    for code in item.codes:
        found = item.decode(code)
        if (math.isnan(found) and math.isnan(value)) or (
                found == value and math.copysign(1, found) == math.copysign(1, value)):
            return code
    raise FormatError(f"{value} is not a value of {item.name}")
