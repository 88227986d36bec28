"""The pages on formats: each element with all of its values, and every short name."""

from __future__ import annotations

import math
from collections.abc import Iterator

from docs.generate.markdown import code, page, table
from scaleprop.formats import ScaledFormat, named_formats
from scaleprop.formats.elements import (
    ELEMENTS,
    SCALES,
    CodebookElement,
    ElementFormat,
    FloatElement,
    IntegerElement,
)
from scaleprop.formats.rounding import MODES
from scaleprop.formats.scaled import RULES

_INDEX = """\
A scaled format is an element, what shares a scale, the format of the scale, and the rule by which
it is found:

    element[granularity]*scale(*tensor_scale)(+zp)(:rule)        e2m1[1x16]*e4m3*f32

    x̂ = value(code) · scale (· tensor_scale)        or        (code − zero_point) · scale

Any combination that makes sense parses; one that does not is refused with the reason. Those with a
short name are below. `scaleprop formats NAME` says the same of any other.
"""
_GRANULARITY = """\
| granularity | who shares a scale |
| --- | --- |
| `[tensor]` | all |
| `[row]` | those along the last axis: a token, or an output channel of a weight |
| `[channel]` | those with the same index on the last axis |
| `[1x32]` | 32 neighbours along the axis that a product sums over |
| `[16x16]` | a tile of the last two axes, so that a transpose has the same scales |
"""
_ROUNDING = """\
Operands of [training recipes](../recipes/training.md) say how they are rounded. All but `nearest`
and `eden` draw n random bits, 8 unless others are asked for (`stochastic:16`). With δ how far x is
from the value below it in magnitude towards the one above (0 … 1), and r uniform on 0 … 2ⁿ−1, it
goes up where the table says so. What is larger than the largest value saturates.
"""
_MODES = {
    "nearest": "δ > ½; ties go to the even code",
    "stochastic": "round(δ·2ⁿ) + r ≥ 2ⁿ, ties to even: unbiased on average",
    "stochastic_odd": "the same, ties to odd",
    "stochastic_fast": "δ·2ⁿ + r + ½ ≥ 2ⁿ",
    "stochastic_fastest": "⌊δ·2ⁿ⌋ + r ≥ 2ⁿ: toward zero by 2⁻⁽ⁿ⁺¹⁾ of a step on average",
}
_EDEN = "as `nearest`, of rotated data; the scales of blocks are then corrected, and rounded " \
        "stochastically, so that the whole is unbiased"
_PAGES = {
    "fp4": ("FP4", ("e2m1",)),
    "fp6": ("FP6", ("e3m2", "e2m3")),
    "fp8": ("FP8", ("e4m3", "e5m2")),
    "integers": ("Integers", ("int8", "int4", "int3", "int2", "mxint8", "ternary")),
    "codebooks": ("Codebooks", ("binary", "nf4", "log2u4", "log2s4", "logsqrt2u4")),
    "scales": ("Scales", SCALES),
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEADS = {
    "fp4": "Sixteen codes: the sign, two bits of exponent and one of mantissa.",
    "fp6": "Sixty-four codes each. Neither has an infinity or a NaN.",
    "fp8": "E4M3 gives up infinity for a larger range; E5M2 keeps both and is as wide as float16.",
    "integers": "Two's complement, symmetric: the most negative code is not used. With `+zp` the "
                "codes are 0 … 2ⁿ−1 instead, and a zero point goes with each scale.",
    "codebooks": "A code is an index into an ascending list of float32 values.",
    "scales": "What scales are stored in. As scales only positive values are used: of E4M3, the "
              "half without a sign.",
}


def pages() -> Iterator[tuple[str, str]]:
    """Paths and texts."""
    missing = set(ELEMENTS) - {name for _, names in _PAGES.values() for name in names}
    if missing:
        raise ValueError(f"no page has the elements {sorted(missing)}: add them to _PAGES")
    yield "formats/index.md", _index()
    for name, (title, elements) in _PAGES.items():
        yield f"formats/{name}.md", _page(title, _LEADS[name], elements)


def _index() -> str:
    rows = [(code(name), code(fmt.long_name.rpartition(":")[0]), str(fmt.bits),
             f"{bits_with_scale(fmt):g}", number(fmt.element.max), code(fmt.rule))
            for name, fmt in named_formats().items()]
    header = ("name", "in full", "bits", "with block scales", "largest", "rule")
    facts = [[f"[`{name}`]({_home(name)}.md#{name})", str(item.bits), *_facts(item).values(),
              item.source] for name, item in ELEMENTS.items()]
    about = ("element", "bits", *_facts(ELEMENTS["e4m3"]), "source")
    return page(
        "Formats", _INDEX, "## Short names", table(header, rows, header[2:5]),
        "*With block scales*: bits a value takes with the scale of its block; a scale for a "
        "tensor, a row or a channel is not counted.",
        "## Elements", table(about, facts, about[1:2]),
        "Any other signed float is `eXmY` with one to eight exponent bits and up to ten mantissa "
        "bits.", "## Who shares a scale", _GRANULARITY,
        "## How a scale is found", table(("rule", "scale"), [(code(name), text)
                                                             for name, text in RULES.items()]),
        "## Rounding", _ROUNDING, table(("rounding", "up where"), [
            *((code(mode), _MODES[mode]) for mode in MODES), (code("eden"), _EDEN)]))


def bits_with_scale(fmt: ScaledFormat) -> float:
    """Bits a value takes with the scale and the zero point of its block."""
    rows, columns = fmt.block or (0, 0)
    shared = fmt.scale.bits + 8 * fmt.zero_point
    return fmt.bits + (shared / (rows * columns) if fmt.block else 0)


def _page(title: str, lead: str, names: tuple[str, ...]) -> str:
    facts = {name: {"bits": str(ELEMENTS[name].bits), **_facts(ELEMENTS[name]),
                    "bias": str(getattr(ELEMENTS[name], "bias", "")),
                    "stored as": _stored(ELEMENTS[name])} for name in names}
    rows = [[key, *(facts[name][key] for name in names)] for key in facts[names[0]]]
    kept = [row for row in rows if any(row[1:])]
    parts: list[str] = [lead, table(("", *map(code, names)), kept)]
    for name in names:
        item = ELEMENTS[name]
        used = [code(short) for short, fmt in named_formats().items()
                if name in (fmt.element.name, fmt.scale.name)]
        parts += [f"## {name}", f"Source: {item.source}." if item.source else "",
                  f"In {', '.join(used)}." if used else "", _values(item)]
    return page(title, *parts)


def _home(name: str) -> str:
    return next(page for page, (_, names) in _PAGES.items() if name in names)


def _facts(item: ElementFormat) -> dict[str, str]:
    """What every table of elements says."""
    fields, normal, least = "", "", item.max
    specials: list[str] = []
    match item:
        case FloatElement():
            fields = f"{int(item.signed)}, {item.exponent_bits}, {item.fraction_bits}"
            normal, least = number(2.0**item.emin), item.smallest
            specials = [text for has, text in (
                (not item.has_zero, "no 0"), (item.has_inf, "Inf"),
                (item.nan_code is not None, "NaN")) if has]
        case IntegerElement():
            least = item.unit
        case CodebookElement():
            least = min(value for value in item.values if value > 0)
        case _:
            raise TypeError(f"{item.name}: no facts are known of {type(item).__name__}")
    return {"sign, exponent, mantissa": fields, "smallest positive": number(least),
            "smallest normal": normal, "largest": number(item.max), "smallest": number(item.min),
            "specials": ", ".join(specials) or "none"}


def _stored(item: ElementFormat) -> str:
    if item.packed:
        shared = math.gcd(8, item.bits)
        return f"{8 // shared} in {item.bits // shared} byte{'s' if item.bits > shared else ''}"
    return f"`{item.storage}`"


def number(value: float) -> str:
    """A value exactly, as a decimal where that is short, else times a power of two; a value that
    takes many digits either way, with six."""
    if not math.isfinite(value):
        return {math.inf: "Inf", -math.inf: "−Inf"}.get(value, "NaN")
    sign = "−" if math.copysign(1, value) < 0 else ""
    size = abs(value)
    if len(plain := f"{size:.12g}") <= 8 and "e" not in plain:
        return sign + plain
    mantissa, exponent = math.frexp(size)
    power = f"2{str(exponent - 1).translate(_RAISED)}"
    if 2 * mantissa == 1:
        return sign + power
    digits = f"{2 * mantissa:.12g}"
    return f"{sign}{digits}·{power}" if len(digits) <= 7 else f"{sign}{size:.6g}"


def _values(item: ElementFormat) -> str:
    """All values: a column a sign and exponent, or a list of codes."""
    if item.bits > 8:
        return ""
    if isinstance(item, FloatElement) and item.bits > 4:
        return _float_values(item)
    codes = [each for each in item.codes
             if not isinstance(item, IntegerElement) or item.min <= item.decode(each) <= item.max]
    if len(codes) > 16:
        unit = f" in steps of {number(item.unit)}" if isinstance(item, IntegerElement) else ""
        return f"{len(codes)} values, {number(item.min)} … {number(item.max)}{unit}."
    half = -(-len(codes) // 2)
    rows = [[text for each in pair for text in (f"`{each:0{item.bits}b}`",
                                                number(item.decode(each)))]
            for pair in zip(codes[:half], codes[half:], strict=False)]
    if len(codes) % 2:
        rows.append([f"`{codes[half - 1]:0{item.bits}b}`", number(item.decode(codes[half - 1])),
                     "", ""])
    return table(("code", "value", "code", "value"), rows, ("value",))


def _float_values(item: FloatElement) -> str:
    """Magnitudes: a row an exponent, a column a mantissa; the sign bit comes first."""
    width = 1 << item.fraction_bits
    header = ["exponent", *(f"mantissa {code(format(each, f'0{item.fraction_bits}b'))}"
                            if item.fraction_bits else "value" for each in range(width))]
    rows = [[code(format(high, f"0{item.exponent_bits}b")),
             *(number(item.magnitude(high * width + low)) for low in range(width))]
            for high in range(1 << item.exponent_bits)]
    if len(rows) > 64:
        rows = [*rows[:4], ["…", "…"], *rows[126:129], ["…", "…"], *rows[-3:]]
    sign = ("The codes with sign `0`; those with sign `1` are the same with a minus."
            if item.signed else "There is no sign.")
    return f"{sign}\n\n" + table(header, rows, header[1:])

