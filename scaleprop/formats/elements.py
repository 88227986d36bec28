"""Element formats: what one stored number can be. One frozen literal per format.

Adding a format is adding a literal to ``ELEMENTS``; every test that sweeps formats picks it up.

What all of them share:
- Quantizing saturates: finite values and ±Inf beyond the largest value become the largest value.
- Ties go to the even code. Without mantissa bits (``e8m0``, ``eXm0``) they go up, as in torch's and
  ml_dtypes' E8M0.
- -0 keeps its sign where the format has one.
- NaN becomes NaN where the format has one, else 0. With scales that are found from the data a NaN
  makes its whole block NaN, whatever the element: see ``scaleprop.formats.scales``.

Every literal says its source: OFP8 is OCP's 8-bit floating point, MX its Microscaling formats.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
import struct

import torch

from scaleprop.errors import FormatError


def float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementFormat(abc.ABC):
    """One stored number: ``bits`` wide, between ``min`` and ``max``; ``source``: who says so."""

    name: str
    source: str = ""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Stored width."""

    @property
    @abc.abstractmethod
    def max(self) -> float:
        """Largest finite value."""

    @property
    @abc.abstractmethod
    def min(self) -> float:
        """Smallest (most negative) finite value."""

    @property
    @abc.abstractmethod
    def mantissa_bits(self) -> int:
        """Bits after the leading one, of the largest values."""

    @abc.abstractmethod
    def decode(self, code: int) -> float:
        """The value of one code, as a Python float: slow, obvious, what tests compare with."""

    @property
    def codes(self) -> range:
        """Every code."""
        return range(1 << self.bits)

    @property
    def storage(self) -> torch.dtype:
        """dtype of the stored tensor; ``uint8`` for codes packed into bytes."""
        return torch.uint8

    @property
    def packed(self) -> bool:
        """Whether codes are packed into bytes, little-endian, along the quantized axis."""
        return self.bits != 8

    @property
    def emax(self) -> int:
        """⌊log2 max⌋."""
        return math.frexp(self.max)[1] - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatElement(ElementFormat):
    """Sign, exponent and mantissa: (1 + f/2^m)·2^(e-bias), and f/2^m·2^(1-bias) where e = 0.

    max_code: magnitude code of the largest finite value. Codes above it are NaN, except that the
        first of them is Inf where ``has_inf``.
    has_zero: E8M0 has neither zero nor subnormals: its code 0 is 2^-bias.
    native: the torch dtype with these very codes, used for storage and for casts.
    """

    exponent_bits: int
    fraction_bits: int
    bias: int
    max_code: int
    signed: bool = True
    has_inf: bool = False
    has_zero: bool = True
    native: torch.dtype | None = None

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        return self.fraction_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def max(self) -> float:
        return self.magnitude(self.max_code)

    @property
    def min(self) -> float:
        return -self.max if self.signed else self.magnitude(0)

    @property
    def smallest(self) -> float:
        """Smallest positive value."""
        return self.magnitude(1 if self.has_zero else 0)

    @property
    def magnitude_codes(self) -> int:
        """How many codes there are without the sign."""
        return 1 << (self.exponent_bits + self.fraction_bits)

    @property
    def nan_code(self) -> int | None:
        """Magnitude code written for NaN: all ones; None where every code is a number."""
        last = self.magnitude_codes - 1
        return last if last > self.max_code + self.has_inf else None

    @property
    def storage(self) -> torch.dtype:
        return self.native or torch.uint8

    @property
    def packed(self) -> bool:
        return self.native is None and self.bits != 8

    def magnitude(self, code: int) -> float:
        """Value of a magnitude code (no sign bit); NaN and Inf above ``max_code``."""
        if code > self.max_code:
            return math.inf if self.has_inf and code == self.max_code + 1 else math.nan
        exponent, fraction = divmod(code, 1 << self.fraction_bits)
        if not self.has_zero:
            return math.ldexp(1.0, exponent - self.bias)
        if exponent == 0:
            return math.ldexp(fraction, self.emin - self.fraction_bits)
        return math.ldexp((1 << self.fraction_bits) + fraction,
                          exponent - self.bias - self.fraction_bits)

    def decode(self, code: int) -> float:
        sign, magnitude = divmod(code, self.magnitude_codes)
        return -self.magnitude(magnitude) if sign else self.magnitude(magnitude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerElement(ElementFormat):
    """A two's-complement integer times ``unit``, symmetric: the most negative code is not used.

    With a zero point (``+zp``) the codes are 0..2^bits-1 instead and the scaled format says so.
    """

    width: int
    high: int
    unit: float = 1.0

    @property
    def bits(self) -> int:
        return self.width

    @property
    def mantissa_bits(self) -> int:
        return max(self.high.bit_length() - 1, 0)

    @property
    def max(self) -> float:
        return self.high * self.unit

    @property
    def min(self) -> float:
        return -self.high * self.unit

    @property
    def levels(self) -> int:
        """Largest code with a zero point: 2^bits - 1."""
        return (1 << self.width) - 1

    @property
    def storage(self) -> torch.dtype:
        return torch.int8 if self.width == 8 else torch.uint8

    def decode(self, code: int) -> float:
        signed = code - (1 << self.width) if code >> (self.width - 1) else code
        return signed * self.unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookElement(ElementFormat):
    """Any ascending list of 2^n ≤ 16 float32 values; a code is an index into it.

    logarithmic: nearest in the logarithm (boundaries are geometric means) instead of nearest.
    boundaries: between neighbours: (boundary in float64, whether a value on it goes up: to even).
    narrow_boundaries: the same decisions for float32 values, with float32 boundaries.
    """

    values: tuple[float, ...]
    logarithmic: bool = False
    boundaries: tuple[tuple[float, bool], ...] = dataclasses.field(
        init=False, compare=False, repr=False)
    narrow_boundaries: tuple[tuple[float, bool], ...] = dataclasses.field(
        init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        powers = (2, 4, 8, 16)
        if len(self.values) not in powers or list(self.values) != sorted(set(self.values)):
            raise FormatError(f"codebook {self.name!r}: needs 2, 4, 8 or 16 ascending values")
        if any(value != float32(value) for value in self.values):
            raise FormatError(f"codebook {self.name!r}: values must be float32 numbers")
        middle = (lambda a, b: math.sqrt(a * b)) if self.logarithmic else (lambda a, b: (a + b) / 2)
        pairs = enumerate(zip(self.values, self.values[1:], strict=False))
        found = tuple((middle(a, b), index % 2 == 1) for index, (a, b) in pairs)
        object.__setattr__(self, "boundaries", found)
        narrow = tuple((float32(b), up if float32(b) == b else float32(b) > b) for b, up in found)
        object.__setattr__(self, "narrow_boundaries", narrow)

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def mantissa_bits(self) -> int:
        return 0

    @property
    def max(self) -> float:
        return self.values[-1]

    @property
    def min(self) -> float:
        return self.values[0]

    def decode(self, code: int) -> float:
        return self.values[code]


def _float(name: str, exponent: int, fraction: int, *, reserved: int = 0, signed: bool = True,
           bias: int | None = None, has_inf: bool = False, has_zero: bool = True,
           native: torch.dtype | None = None, source: str = "") -> FloatElement:
    """A float literal; ``reserved``: how many magnitude codes at the top are not finite."""
    return FloatElement(
        name=name, exponent_bits=exponent, fraction_bits=fraction, signed=signed,
        bias=(1 << (exponent - 1)) - 1 if bias is None else bias,
        max_code=(1 << (exponent + fraction)) - 1 - reserved,
        has_inf=has_inf, has_zero=has_zero, native=native, source=source)


_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)

_OFP8, _MX, _IEEE = "OCP OFP8 1.0", "OCP MX 1.0", "IEEE 754-2019"
_UE5M3 = "the unsigned block scale of FP4 training, published with two maxima; this one's is "
_REPQ = "RepQ-ViT, arXiv:2212.08254; rounds in the logarithm"

_LITERALS: tuple[ElementFormat, ...] = (
    _float("e4m3", 4, 3, reserved=1, native=_E4M3,  # (FN): max 448
           source=f"{_OFP8}, tables 1 and 2; {_MX}, section 5.3.1"),
    _float("e5m2", 5, 2, reserved=4, has_inf=True, native=_E5M2,  # max 57344
           source=f"{_OFP8}, tables 1 and 2; {_MX}, section 5.3.1"),
    _float("e3m2", 3, 2, source=f"{_MX}, section 5.3.2"),  # max 28
    _float("e2m3", 2, 3, source=f"{_MX}, section 5.3.2"),  # max 7.5
    _float("e2m1", 2, 1, source=f"{_MX}, section 5.3.3"),  # 0 .5 1 1.5 2 3 4 6
    _float("e8m0", 8, 0, reserved=1, signed=False, bias=127, has_zero=False,
           native=torch.float8_e8m0fnu, source=f"{_MX}, section 5.4.1"),  # 2^-127 … 2^127
    _float("ue5m3", 5, 3, reserved=8, signed=False,  # top exponent reserved
           source=f"{_UE5M3}61440"),
    _float("ue5m3x", 5, 3, reserved=1, signed=False,  # extended: only 0xFF is NaN
           source=f"{_UE5M3}114688"),
    _float("f32", 8, 23, reserved=1 << 23, has_inf=True, native=torch.float32,
           source=f"{_IEEE}, binary32"),
    _float("bf16", 8, 7, reserved=1 << 7, has_inf=True, native=torch.bfloat16,
           source="the upper half of binary32"),
    _float("f16", 5, 10, reserved=1 << 10, has_inf=True, native=torch.float16,
           source=f"{_IEEE}, binary16"),
    IntegerElement(name="int8", width=8, high=127),
    IntegerElement(name="int4", width=4, high=7),
    IntegerElement(name="int3", width=3, high=3),
    IntegerElement(name="int2", width=2, high=1),
    IntegerElement(name="mxint8", width=8, high=127, unit=2.0**-6,  # ±1.984375
                   source=f"{_MX}, section 5.3.4"),
    IntegerElement(name="ternary", width=2, high=1,  # -1 0 1
                   source="BitNet b1.58, arXiv:2402.17764, with :absmean"),
    CodebookElement(name="binary", values=(-1.0, 1.0),  # 0 is a tie: -1
                    source="XNOR-Net, arXiv:1603.05279, with :absmean"),
    CodebookElement(name="nf4", values=_NF4, source="QLoRA, arXiv:2305.14314"),
    CodebookElement(name="log2u4", values=tuple(2.0**-k for k in range(15, -1, -1)),
                    logarithmic=True, source=_REPQ),
    CodebookElement(name="log2s4", logarithmic=False,
                    values=(*(-(2.0**-k) for k in range(8)), *(2.0**-k for k in range(7, -1, -1)))),
    CodebookElement(name="logsqrt2u4", logarithmic=True, source=_REPQ,
                    values=tuple(float32(2.0 ** (-k / 2)) for k in range(15, -1, -1))),
)

ELEMENTS: dict[str, ElementFormat] = {literal.name: literal for literal in _LITERALS}

# As scales: positive values only (E4M3 is used without its sign, as NVFP4 does).
SCALES: tuple[str, ...] = ("f32", "bf16", "f16", "e8m0", "e4m3", "ue5m3", "ue5m3x")

_GENERIC = re.compile(r"e([1-8])m(10|[0-9])")


def element(name: str) -> ElementFormat:
    """The element format of this name: a literal, or a generic signed ``eXmY``.

    Generic: 1–8 exponent bits, 0–10 mantissa bits, bias 2^(X-1)-1, subnormals. From five exponent
    bits on the top exponent is IEEE's Inf and NaN (so ``e5m10`` is float16 and ``e8m7`` bfloat16);
    below, every code is a number (as in E3M2, E2M3, E2M1). Wider than eight bits: packed, too.

    >>> element("e3m2").max, element("int4").max
    (28.0, 7.0)

    Raises:
        FormatError: for any other name.
    """
    if name in ELEMENTS:
        return ELEMENTS[name]
    match = _GENERIC.fullmatch(name)
    if match is None:
        raise FormatError(f"unknown element format {name!r}; known: {', '.join(ELEMENTS)}, "
                          "and eXmY with 1–8 exponent and 0–10 mantissa bits")
    exponent, fraction = int(match[1]), int(match[2])
    ieee = exponent >= 5
    return _float(name, exponent, fraction, has_inf=ieee, reserved=1 << fraction if ieee else 0)


def scale_element(name: str) -> FloatElement:
    """The scale format of this name.

    Raises:
        FormatError: naming those that exist.
    """
    if name not in SCALES:
        raise FormatError(f"unknown scale format {name!r}; known: {', '.join(SCALES)}")
    literal = ELEMENTS[name]
    assert isinstance(literal, FloatElement)
    return literal
