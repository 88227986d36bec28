"""What a format's elements can be: the band that values are drawn against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledFormat, parse
from scaleprop.formats.elements import ElementFormat, FloatElement, IntegerElement
from scaleprop.report.records import TensorRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatRange:
    """The magnitudes that a scaled format's elements have, before the scale.

    element: its name. min_subnormal: the smallest positive value. min_normal: the smallest with all
    mantissa bits; integers and codebooks have no subnormals, and both are the same. max: the
    largest. bits: of an element, scales not counted. block: rows × columns that share a scale;
    None for whole rows, channels and tensors. scale: the scales' own format.
    """

    element: str
    min_subnormal: float
    min_normal: float
    max: float
    bits: int
    block: tuple[int, int] | None
    scale: str

    @property
    def exponents(self) -> tuple[int, int]:
        """⌊log2⌋ of the smallest and of the largest value: the ends of the band."""
        return math.frexp(self.min_subnormal)[1] - 1, math.frexp(self.max)[1] - 1


def range_of(name: str) -> FormatRange:
    """The range of the scaled format of this name.

    Raises:
        FormatError: for a name that is none.
    """
    fmt = parse(name)
    smallest, normal = _smallest(fmt.element)
    return FormatRange(element=fmt.element.name, min_subnormal=smallest, min_normal=normal,
                       max=_largest(fmt), bits=fmt.bits, block=fmt.block, scale=fmt.scale.name)


def ranges_of(records: Iterable[TensorRecord]) -> dict[str, FormatRange]:
    """Format → range, of the formats that ``records`` name; names that are none are left out, as a
    report of another version may have them."""
    found: dict[str, FormatRange] = {}
    for name in {record.format: None for record in records if record.format is not None}:
        try:
            found[name] = range_of(name)
        except FormatError:
            continue
    return found


def _smallest(item: ElementFormat) -> tuple[float, float]:
    if isinstance(item, FloatElement):
        return item.smallest, math.ldexp(1.0, item.emin)
    if isinstance(item, IntegerElement):
        return item.unit, item.unit
    smallest = min(value for value in map(item.decode, item.codes) if value > 0)
    return smallest, smallest


def _largest(fmt: ScaledFormat) -> float:
    if fmt.zero_point and isinstance(fmt.element, IntegerElement):
        return float(fmt.element.levels)
    return max(fmt.element.max, -fmt.element.min)
