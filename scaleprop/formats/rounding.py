"""Rounding tensors to element formats: vectorised, exact, traceable (no data-dependent control).

``nearest`` and ``stochastic`` take float32 or float64 and return grid values in the same dtype;
each rounds once, in the dtype it is given. ``encode`` and ``decode`` go between grid values and
integer codes. ``scaleprop.formats.reference`` says the same things one number at a time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import (
    CodebookElement,
    ElementFormat,
    FloatElement,
    IntegerElement,
)

MODES = ("nearest", "stochastic", "stochastic_odd", "stochastic_fast", "stochastic_fastest")
DEFAULT_BITS = 8
MAX_BITS = 22  # thresholds stay exact in float32


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How to round: one of ``MODES``, and for stochastic ones how many random bits an element has.

    With lo = ⌊|x|⌋ on the grid, δ = (|x| - lo)/ulp and r uniform on 0..2^n-1, |x| goes up iff
    ``stochastic``: RNE(δ·2^n) + r ≥ 2^n (unbiased on average; gfloat's ``Stochastic``);
    ``stochastic_odd``: the same with ties to odd; ``stochastic_fast``: δ·2^n + r + ½ ≥ 2^n;
    ``stochastic_fastest``: ⌊δ·2^n⌋ + r ≥ 2^n (biased toward zero by 2^-(n+1) ulp).
    Sign-magnitude; saturates afterwards; representable values never move.
    """

    mode: str
    bits: int = DEFAULT_BITS

    @property
    def stochastic(self) -> bool:
        """Whether random bits are needed."""
        return self.mode != "nearest"


def parse_rounding(name: str) -> Rounding:
    """``nearest``, or ``stochastic`` (8 random bits), or ``stochastic:16`` (16 bits), ….

    Raises:
        FormatError: listing the modes.
    """
    mode, colon, width = name.partition(":")
    stated = width.isdecimal() and 1 <= int(width) <= MAX_BITS
    if mode not in MODES or (colon and (mode == "nearest" or not stated)):
        raise FormatError(f"unknown rounding {name!r}; known: {', '.join(MODES)}; stochastic ones "
                          f"may state 1 to {MAX_BITS} random bits, as in 'stochastic:16'")
    return Rounding(mode, int(width) if colon else DEFAULT_BITS)


def power_of_two_below(x: Tensor) -> Tensor:
    """2^⌊log2|x|⌋ by masking the exponent; 0 for zero and subnormals, Inf for Inf and NaN."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def nearest(x: Tensor, element: ElementFormat) -> Tensor:
    """``x`` rounded to the nearest value, ties to even, saturated; NaN stays NaN."""
    if isinstance(element, IntegerElement):
        return _integer_nearest(x, element)
    if isinstance(element, CodebookElement):
        return _lookup(x, element)
    assert isinstance(element, FloatElement)
    bounded = x.clamp(element.min if element.signed else element.magnitude(0), element.max)
    return _float_nearest(bounded, element)


def _integer_nearest(x: Tensor, element: IntegerElement) -> Tensor:
    if element.unit == 1.0:
        return x.round().clamp(-element.high, element.high)
    rounded = (x * (1.0 / element.unit)).round().clamp(-element.high, element.high)
    return rounded * element.unit


def _float_nearest(x: Tensor, element: FloatElement) -> Tensor:
    """Adding and subtracting 1.5·2^digits·ulp leaves the nearest multiple of the ulp."""
    if x.dtype == torch.float32 and element.emax > 100:
        return _float_nearest(x.double(), element).to(x.dtype)
    digits = 52 if x.dtype == torch.float64 else 23
    magic = power_below(x, element) * (1.5 * 2.0 ** (digits - element.fraction_bits))
    return torch.copysign((x + magic) - magic, x)


def power_below(x: Tensor, element: FloatElement) -> Tensor:
    """2^⌊log2|x|⌋ of |x| ≤ ``element.max``, at least that of its smallest normal value."""
    if x.is_cuda or element.emax > 100:
        return power_of_two_below(x).clamp(2.0**element.emin, 2.0**element.emax)
    return _leading_power(x).clamp(min=2.0**element.emin)


def _leading_power(x: Tensor) -> Tensor:
    """2^⌊log2|x|⌋ in float arithmetic (S. M. Rump, SIAM J. Sci. Comput. 31, 2009): it vectorises
    where a bitcast does not. Needs |x| < 2^100, and multiply and subtract rounded separately, which
    CPU compilers do here and GPU compilers do not."""
    digits = 52 if x.dtype == torch.float64 else 23
    scaled = x * (2.0**digits + 1.0)
    return (scaled - scaled * (1.0 - 2.0 ** -(digits + 1))).abs()


def _lookup(x: Tensor, element: CodebookElement) -> Tensor:
    value = torch.full_like(x, element.values[0])
    wide = x.dtype == torch.float64
    boundaries = element.boundaries if wide else element.narrow_boundaries
    for (boundary, inclusive), upper in zip(boundaries, element.values[1:], strict=True):
        value = torch.where(x >= boundary if inclusive else x > boundary, upper, value)
    return torch.where(x.isnan(), x, value)


def stochastic(x: Tensor, element: ElementFormat, rounding: Rounding, bits: Tensor) -> Tensor:
    """``x`` rounded up or down in magnitude by ``bits`` (integers in 0..2^n-1, shape of ``x``)."""
    if isinstance(element, CodebookElement):
        return _codebook_stochastic(x, element, rounding, bits)
    size = x.abs()
    if isinstance(element, IntegerElement):
        rounded = stochastic_multiple(size, element.unit, rounding, bits)
        return torch.copysign(rounded.clamp(max=element.max), x)
    assert isinstance(element, FloatElement)
    if not element.signed:
        size = x.clamp(min=element.magnitude(0))
    if element.emin - element.fraction_bits < -126 and x.dtype == torch.float32:
        return stochastic(x.double(), element, rounding, bits).to(x.dtype)
    size = size.clamp(max=element.max)
    ulp = power_below(size, element) * 2.0**-element.fraction_bits
    rounded = stochastic_multiple(size, ulp, rounding, bits).clamp(max=element.max)
    return torch.copysign(rounded, x) if element.signed else rounded


def stochastic_multiple(size: Tensor, ulp: Tensor | float, rounding: Rounding,
                        bits: Tensor) -> Tensor:
    """``size`` ≥ 0 rounded to a multiple of ``ulp``, a power of two."""
    steps = size / ulp
    below = steps.floor()
    return (below + goes_up(steps - below, rounding, bits)) * ulp


def goes_up(delta: Tensor, rounding: Rounding, bits: Tensor) -> Tensor:
    """1.0 where ``delta`` in [0, 1) rounds up by ``rounding``'s rule, else 0.0."""
    scaled = delta * 2.0**rounding.bits
    threshold = 2.0**rounding.bits - bits.to(delta.dtype)
    if rounding.mode == "stochastic":
        up = scaled.round() >= threshold
    elif rounding.mode == "stochastic_odd":
        up = _round_to_odd(scaled) >= threshold
    elif rounding.mode == "stochastic_fast":
        up = scaled >= threshold - 0.5
    else:
        up = scaled >= threshold
    return up.to(delta.dtype)


def _round_to_odd(x: Tensor) -> Tensor:
    """Nearest integer, ties to odd."""
    below = x.floor()
    rest = x - below
    even = below == (below * 0.5).floor() * 2.0
    return below + ((rest > 0.5) | ((rest == 0.5) & even)).to(x.dtype)


def _codebook_stochastic(x: Tensor, element: CodebookElement, rounding: Rounding,
                         bits: Tensor) -> Tensor:
    """Between neighbours, δ in float64 (its rounding moves the odds by 2^-53)."""
    if x.dtype != torch.float64:
        return _codebook_stochastic(x.double(), element, rounding, bits).to(x.dtype)
    lower = torch.full_like(x, element.values[0])
    gap = torch.full_like(x, element.values[1] - element.values[0])
    for value, upper in zip(element.values[1:-1], element.values[2:], strict=True):
        lower = torch.where(x >= value, value, lower)
        gap = torch.where(x >= value, upper - value, gap)
    delta = ((x.clamp(element.min, element.max) - lower) / gap).clamp(0.0, 1.0)
    up = goes_up(delta, rounding, bits) > 0
    upper = torch.full_like(x, element.values[1])
    for value, above in zip(element.values[1:-1], element.values[2:], strict=True):
        upper = torch.where(x >= value, above, upper)
    return torch.where(x.isnan(), x, torch.where(up, upper, lower))


def round_tensor(x: Tensor, element: ElementFormat, rounding: Rounding,
                 bits: Tensor | None) -> Tensor:
    """``nearest`` or ``stochastic``, as ``rounding`` says."""
    if bits is None:
        return nearest(x, element)
    return stochastic(x, element, rounding, bits)


def has_nan(element: ElementFormat) -> bool:
    """Whether a code means NaN."""
    return isinstance(element, FloatElement) and element.nan_code is not None


def encode(values: Tensor, element: ElementFormat) -> Tensor:
    """Codes of grid values: the native float8, int8, or uint8 (int32 above eight bits).

    NaN becomes the format's NaN, else the code of 0 (or of the value nearest to 0).
    """
    if isinstance(element, FloatElement) and element.native is not None:
        return values.to(torch.float32).to(element.native)
    dtype = torch.uint8 if element.bits <= 8 else torch.int32
    if isinstance(element, FloatElement):
        return _float_encode(values, element).to(dtype)
    known = torch.where(values.isnan(), 0.0, values)
    if isinstance(element, IntegerElement):
        return (known * (1.0 / element.unit)).to(torch.int8)
    assert isinstance(element, CodebookElement)
    code = torch.zeros_like(known)
    for boundary, _ in element.boundaries:
        code = code + (known > boundary)
    return code.to(dtype)


def _float_encode(values: Tensor, element: FloatElement) -> Tensor:
    """Magnitude codes are the float32 bits, shifted and rebiased; subnormals count in steps."""
    m = element.fraction_bits
    size = values.to(torch.float32).abs()
    normal = (size.view(torch.int32) >> (23 - m)) - ((127 - element.bias) << m)
    steps = (size * 2.0 ** min(m - element.emin, 126)).clamp(max=2.0**m)
    if m - element.emin > 126:
        steps = (size * 2.0**126 * 2.0 ** (m - element.emin - 126)).clamp(max=2.0**m)
    unknown = size.isnan()
    subnormal = torch.where(unknown, 0.0, steps).to(torch.int32)
    code = torch.where(size < 2.0**element.emin, subnormal, normal)
    code = torch.where(unknown, element.nan_code or 0, code)
    if not element.signed:
        return code
    return code | (values.signbit().to(torch.int32) * element.magnitude_codes)


def decode(codes: Tensor, element: ElementFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes as ``encode`` writes them, in float32 or float64; exact."""
    if isinstance(element, FloatElement):
        if element.native is not None:
            return codes.to(torch.float32).to(dtype)
        return _float_decode(codes.to(torch.int32), element).to(dtype)
    if isinstance(element, IntegerElement):
        value = codes.to(dtype)
        return value if element.unit == 1.0 else value * element.unit
    assert isinstance(element, CodebookElement)
    value = torch.full(codes.shape, element.values[0], dtype=dtype, device=codes.device)
    for index, entry in enumerate(element.values[1:], start=1):
        value = torch.where(codes == index, entry, value)
    return value


def _float_decode(codes: Tensor, element: FloatElement) -> Tensor:
    m = element.fraction_bits
    magnitude = codes & (element.magnitude_codes - 1)
    normal = ((magnitude << (23 - m)) + ((127 - element.bias) << 23)).view(torch.float32)
    steps = magnitude.to(torch.float32) * 2.0 ** (element.emin - m)
    size = torch.where(magnitude < (1 << m), steps, normal)
    if element.max_code < element.magnitude_codes - 1:
        size = torch.where(magnitude > element.max_code, torch.nan, size)
    if element.has_inf:
        size = torch.where(magnitude == element.max_code + 1, torch.inf, size)
    return torch.where(codes >= element.magnitude_codes, -size, size) if element.signed else size
