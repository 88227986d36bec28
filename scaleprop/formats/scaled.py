"""Scaled formats: an element format, which elements share a scale, and how the scale is found.

    x̂ = value(code) · scale            (· tensor_scale where there are two levels)
    x̂ = (code - zero_point) · scale    (integers with ``+zp``)

A name is ``element[granularity]*scale(*tensor_scale)(+zp)(:rule)``; the common ones have short
names. ``str(parse(name))`` is the canonical name and parses back to an equal format.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Literal

from scaleprop.errors import FormatError
from scaleprop.formats.elements import (
    ELEMENTS,
    SCALES,
    ElementFormat,
    FloatElement,
    IntegerElement,
    element,
    scale_element,
)

Kind = Literal["tensor", "row", "channel", "block", "tile"]

RULES: Mapping[str, str] = {
    "floor": "2^(⌊log2 amax⌋ - emax): OCP MX; saturates when amax's mantissa exceeds max's",
    "rceil": "smallest 2^e with amax/2^e ≤ max: NVIDIA",
    "ceil": "2^(⌈log2 amax⌉ - emax)",
    "even": "floor, after rounding amax to the element's mantissa",
    "pow2": "smallest power of two that does not saturate, in any scale format",
    "exact": "amax/max, rounded to the scale format",
    "absmean": "mean |x|, rounded to the scale format (BitNet b1.58, XNOR-Net)",
    "rms": "2^⌊log2(2.92247856/6·σ)⌋, σ the root of mean x² (Quartet, arXiv:2505.14669); FP4 only",
    "mse": "search for the scale of least squared error",
    "fouroversix": "per block, the better of amax→6 and amax→4 (arXiv:2512.02010); FP4 only",
}
POWER_RULES = ("floor", "rceil", "ceil", "even", "pow2")
FLT_MAX = (2.0 - 2.0**-23) * 2.0**127
PLAIN = ("f32", "bf16", "f16")  # names of operands that are not quantized; not scaled formats
_ALIASES = {"4over6": "fouroversix", "four_over_six": "fouroversix", "amax": "exact"}


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which elements share a scale. Axes are those after moving the quantized axis last.

    tensor: all. row: those along the last axis (a token; an output channel of a weight [N, K]).
    channel: those with the same index on the last axis. block: ``columns`` neighbours along the
    last axis. tile: ``rows`` × ``columns`` over the last two axes.
    """

    kind: Kind
    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        blocked = self.kind in ("block", "tile")
        return f"{self.rows}x{self.columns}" if blocked else self.kind


@dataclasses.dataclass(frozen=True)
class ScaledFormat:
    """A complete description of a quantized tensor; ``parse`` makes them from names.

    element: format of one element. granularity: which elements share a scale.
    scale: element format of the stored scales, one of ``elements.SCALES``.
    rule: how scales are found, one of ``RULES``.
    two_level: with a float32 scale of the whole tensor on top.
    zero_point: integers 0..2^bits-1 with a zero point per scale.
    scale_bound: the largest scale with max·scale ≤ FLT_MAX, so that nothing finite becomes Inf.
    """

    element: ElementFormat
    granularity: Granularity
    scale: FloatElement
    rule: str
    two_level: bool = False
    zero_point: bool = False
    scale_bound: float = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        problem = _contradiction(self)
        if problem:
            raise FormatError(f"format {self.long_name!r}: {problem}")
        object.__setattr__(self, "scale_bound", _scale_bound(self.element, self.scale))

    @property
    def long_name(self) -> str:
        """The name that spells everything out."""
        second = "*f32" if self.two_level else ""
        zero_point = "+zp" if self.zero_point else ""
        name = f"{self.element.name}[{self.granularity}]*{self.scale.name}{second}{zero_point}"
        return f"{name}:{self.rule}"

    def __str__(self) -> str:
        """The canonical name: short where one exists, the rule only where it is not the default."""
        default = _default_rule(self.element, self.scale)
        stem, plus, _ = self.long_name.rpartition(":")[0].partition("+zp")
        shorter = _SHORT_BY_STEM.get(stem, stem) + plus
        return shorter if self.rule == default else f"{shorter}:{self.rule}"

    @property
    def bits(self) -> int:
        """Stored width of an element, scales not counted."""
        return self.element.bits

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) sharing a scale, for blocks and tiles."""
        size = (self.granularity.rows, self.granularity.columns)
        return size if self.granularity.kind in ("block", "tile") else None

    @property
    def parts_count(self) -> int:
        """How many tensors a quantized tensor has: data, scale, (tensor scale), (zero point)."""
        return 2 + self.two_level + self.zero_point

    def replace(self, **changes: object) -> ScaledFormat:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _scale_bound(item: ElementFormat, scale: FloatElement) -> float:
    """The largest value of the scale format with max·scale ≤ FLT_MAX."""
    limit = min(scale.max, FLT_MAX / max(item.max, -item.min))
    if limit == scale.max:
        return limit
    exponent = math.frexp(limit)[1] - 1 - scale.fraction_bits
    return math.ldexp(math.floor(math.ldexp(limit, -exponent)), exponent)


def _default_rule(item: ElementFormat, scale: FloatElement) -> str:
    if not scale.has_zero:
        return "floor"
    return "absmean" if item.name in ("ternary", "binary") else "exact"


def _contradiction(fmt: ScaledFormat) -> str | None:
    """Why this combination makes no sense, with the remedy; None where it does."""
    if fmt.element.name in PLAIN:
        return f"{fmt.element.name} is not a quantized element; use e8m7, e5m10 or a narrower one"
    if fmt.rule not in RULES:
        return f"unknown scale rule {fmt.rule!r}; known: {', '.join(RULES)}"
    if not fmt.scale.has_zero and fmt.rule in ("exact", "absmean"):
        return f"{fmt.scale.name} holds powers of two: use one of {', '.join(POWER_RULES)}, mse"
    if fmt.rule == "fouroversix" and (fmt.element.name != "e2m1" or not fmt.two_level):
        return "fouroversix is for e2m1 with a tensor scale, as in 'nvfp4:fouroversix'"
    if fmt.rule == "rms" and (fmt.element.name != "e2m1" or fmt.two_level):
        return "rms is for e2m1 with scales of one level, as in 'mxfp4:rms'"
    if fmt.rule == "absmean" and (fmt.zero_point or fmt.two_level):
        return "absmean has one level and no zero point: drop '+zp' and the tensor scale"
    return _zero_point_contradiction(fmt) or _granularity_contradiction(fmt)


def _zero_point_contradiction(fmt: ScaledFormat) -> str | None:
    if not fmt.zero_point:
        return None
    if not isinstance(fmt.element, IntegerElement) or fmt.element.unit != 1.0:
        return "only int2, int3, int4, int8 take a zero point: drop '+zp'"
    if fmt.two_level or fmt.rule not in ("exact", "mse") or not fmt.scale.has_zero:
        return "'+zp' takes one float scale (f32, bf16, f16) and rule exact or mse"
    return None


def _granularity_contradiction(fmt: ScaledFormat) -> str | None:
    if fmt.two_level and fmt.granularity.kind == "tensor":
        return "one scale for the tensor is enough: drop the tensor scale"
    if min(fmt.granularity.rows, fmt.granularity.columns) < 1:
        return "block sizes are at least 1"
    return None


_SHORT: Mapping[str, str] = {
    "fp8": "e4m3[tensor]*f32",
    "fp8_e5m2": "e5m2[tensor]*f32",
    "int8": "int8[tensor]*f32",
    "int4": "int4[1x128]*f16",
    "int3": "int3[1x128]*f16",
    "int2": "int2[1x64]*f16",
    "mxfp8": "e4m3[1x32]*e8m0",
    "mxfp8_e5m2": "e5m2[1x32]*e8m0",
    "mxfp6": "e2m3[1x32]*e8m0",
    "mxfp6_e3m2": "e3m2[1x32]*e8m0",
    "mxfp4": "e2m1[1x32]*e8m0",
    "mxint8": "mxint8[1x32]*e8m0",
    "nvfp4": "e2m1[1x16]*e4m3*f32",
    "nvfp4_2d": "e2m1[16x16]*e4m3*f32",
    "fp4_ue5m3": "e2m1[1x16]*ue5m3*f32",
    "nf4": "nf4[1x64]*f32",
    "ternary": "ternary[tensor]*f32",
    "binary": "binary[row]*f32",
    "log2": "log2u4[tensor]*f32",
    "logsqrt2": "logsqrt2u4[tensor]*f32",
}
_SHORT_BY_STEM: dict[str, str] = {long: short for short, long in _SHORT.items()}

_PARSED: dict[str, ScaledFormat] = {}  # not functools.cache: torch.compile warns of that

_GRAMMAR = re.compile(
    r"(?P<element>\w+)\[(?P<granularity>\w+)\]\*(?P<scale>\w+)(\*(?P<second>\w+))?"
    r"(?P<zero_point>\+zp)?(:(?P<rule>\w+))?")
_SHORT_GRAMMAR = re.compile(r"(?P<stem>\w+)(?P<zero_point>\+zp)?(?P<rule>:\w+)?")


def _parse(name: str) -> ScaledFormat:
    short = _SHORT_GRAMMAR.fullmatch(name)
    if short and short["stem"] in _SHORT:
        tail = (short["zero_point"] or "") + (short["rule"] or "")
        return _parse(_SHORT[short["stem"]] + tail)
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise FormatError(_unknown(name))
    try:
        item, scale = element(match["element"]), scale_element(match["scale"])
    except FormatError as error:
        raise FormatError(f"format {name!r}: {error}") from error
    if match["second"] not in (None, "f32"):
        raise FormatError(f"format {name!r}: the tensor scale is f32, not {match['second']!r}")
    rule = match["rule"] or _default_rule(item, scale)
    return ScaledFormat(
        element=item, granularity=_granularity(name, match["granularity"]), scale=scale,
        rule=_ALIASES.get(rule, rule), two_level=match["second"] is not None,
        zero_point=match["zero_point"] is not None)


def _granularity(name: str, text: str) -> Granularity:
    if text in ("tensor", "row", "channel"):
        return Granularity(text)
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise FormatError(f"format {name!r}: granularity [{text}] is none of [tensor], [row], "
                          "[channel], [1x32] (blocks), [16x16] (tiles)")
    rows, columns = int(match[1]), int(match[2])
    return Granularity("block" if rows == 1 else "tile", rows, columns)


def _unknown(name: str) -> str:
    stem = re.split(r"[\[+:*]", name)[0]
    close = difflib.get_close_matches(stem, sorted({*_SHORT, *ELEMENTS}), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (f"unknown format {name!r}: {hint}Short names: {', '.join(_SHORT)}. In full: "
            f"element[tensor|row|channel|1x32|16x16]*scale(*f32)(+zp)(:rule), such as "
            f"'e2m1[1x16]*e4m3*f32'; scales: {', '.join(SCALES)}; rules: {', '.join(RULES)}")


def parse(name: str | ScaledFormat) -> ScaledFormat:
    """The format of this name; a format is returned as it is.

    >>> fmt = parse("e2m1[1x16]*e4m3*f32")
    >>> fmt.element.name, fmt.element.max
    ('e2m1', 6.0)

    Raises:
        FormatError: unknown (with close matches) or contradictory (with the remedy).
    """
    if isinstance(name, ScaledFormat):
        return name
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(f"a format is a name or a ScaledFormat, not {type(name).__name__}")
    if name not in _PARSED:
        _PARSED[name] = _parse(name.strip())
    return _PARSED[name]


def named_formats() -> dict[str, ScaledFormat]:
    """Short name → format, for every short name."""
    return {short: _parse(short) for short in _SHORT}
