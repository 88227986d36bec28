"""Formats in constants, as kernels take them: compiled in, found once on the host."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from scaleprop.errors import FormatError
from scaleprop.formats.elements import ElementFormat, FloatElement, IntegerElement
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat
from scaleprop.formats.scales import target

PACKED = (4, 6, 8)  # bits of elements that kernels pack and unpack


def bits_of(value: float) -> int:
    """The bits of a float32, as an integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


class Element(NamedTuple):
    """An element format in constants. integer: two's complement times ``unit``, no exponent.

    top: bits of the largest value, or the largest integer. least: bits of the smallest normal
    value. steps: what makes a subnormal value a whole number. nan: its code; −1 where none is.
    inf: the largest exponent is that of Inf and NaN. native: that the device converts to, 1: E4M3,
    2: E5M2.
    """

    integer: int
    bits: int
    signed: int
    fraction: int
    bias: int
    top: int
    least: int
    steps: float
    nan: int
    inf: int
    native: int = 0


def element_constants(item: ElementFormat) -> Element:
    """The constants of a float or integer format of at most 8 bits that has a zero.

    Raises:
        FormatError: for codebooks, wider formats and E8M0.
    """
    if isinstance(item, IntegerElement) and item.bits <= 8:
        return Element(1, item.bits, 1, 0, 0, item.high, 0, 1.0 / item.unit, -1, 0)
    if isinstance(item, FloatElement) and item.has_zero and item.bits <= 8:
        nan = -1 if item.nan_code is None else item.nan_code
        return Element(0, item.bits, int(item.signed), item.fraction_bits, item.bias,
                       bits_of(item.max), bits_of(2.0**item.emin),
                       2.0 ** (item.fraction_bits - item.emin), nan, int(item.has_inf))
    raise FormatError(f"no kernel rounds to {item.name}")


class Scaling(NamedTuple):
    """How scales are found, in constants.

    power: by powers of two: 2^⌊log2 amax⌋·``lower``, in ``smallest``..``bound``, doubled where amax
    passes ``threshold`` times it (or reaches it, ``inclusive``); ``threshold`` 0: never doubled.
    Else amax/``top``, at most ``bound``, rounded to the scale's format, whose constants are
    ``item``; None: float32. zero: scales can be 0, and such become 1 where there is one level.
    two: below a scale of the whole tensor, whose largest block scale is ``target``.
    """

    power: int
    two: int
    zero: int
    top: float
    lower: float
    smallest: float
    bound: float
    threshold: float
    inclusive: int
    target: float
    reciprocal: float
    item: Element | None
    stored: int  # 0: float32, 1: E8M0, 2: codes of ``item``


def scaling_constants(fmt: ScaledFormat) -> Scaling:
    """The constants of rules that need nothing but amax.

    Raises:
        FormatError: for others, and for scale formats of 16 bits.
    """
    item = fmt.element
    if fmt.rule not in (*POWER_RULES, "exact"):
        raise FormatError(f"no kernel finds scales by {fmt.long_name!r}")
    power = fmt.rule in POWER_RULES or not fmt.scale.has_zero
    thresholds = {"rceil": item.max, "pow2": item.max, "ceil": 2.0**item.emax,
                  "even": (2.0 - 2.0 ** -(item.mantissa_bits + 1)) * 2.0**item.emax}
    bound = math.ldexp(1.0, math.frexp(fmt.scale_bound)[1] - 1) if power else fmt.scale_bound
    stored = 0 if fmt.scale.name == "f32" else 1 if not fmt.scale.has_zero else 2
    return Scaling(
        power=int(power), two=int(fmt.two_level), zero=int(fmt.scale.has_zero), top=item.max,
        lower=2.0**-item.emax, smallest=max(fmt.scale.smallest, 2.0**-127), bound=bound,
        threshold=thresholds.get(fmt.rule, 0.0), inclusive=int(fmt.rule == "even"),
        target=target(fmt), reciprocal=1.0 / item.max,
        item=element_constants(fmt.scale) if stored == 2 else None, stored=stored)


class Stored(NamedTuple):
    """What a format stores, in constants.

    scale: 0, floats; 1, E8M0; 2, codes of ``item``; 3, bits of bfloat16. zero: with zero points.
    two: below a scale of the whole tensor. rows, columns: of a group; columns 0: a whole row, of
    ``rows`` 1, or the whole tensor, of ``rows`` 0.
    """

    element: Element
    scale: int
    item: Element | None
    zero: int
    rows: int
    columns: int
    two: int


def stored_constants(fmt: ScaledFormat) -> Stored:
    """The constants of a format whose parts kernels read: elements of 4, 6 or 8 bits, in any
    groups but channels.

    Raises:
        FormatError: for others.
    """
    element = element_constants(fmt.element)
    if element.bits not in PACKED or fmt.granularity.kind == "channel":
        raise FormatError(f"no kernel reads {fmt.long_name!r}")
    whole = {"row": (1, 0), "tensor": (0, 0)}
    rows, columns = fmt.block or whole[fmt.granularity.kind]
    floats = {"f32": 0, "f16": 0, "bf16": 3}
    scale = floats.get(fmt.scale.name, 2 if fmt.scale.has_zero else 1)
    item = element_constants(fmt.scale) if scale == 2 else None
    return Stored(element, scale, item, int(fmt.zero_point), rows, columns, int(fmt.two_level))
