"""Stored state: which formats there are, and how a tensor becomes data · 2^e and back.

This is what the numbers are. ``kernels`` and ``batches`` compute the same bits in less time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from scaleprop.formats.elements import FloatElement, element
from scaleprop.formats.rounding import Rounding, decode, encode, nearest, stochastic

RANDOM_BITS = 16


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """Stored values: ``element`` · 2^e. block: how many share e, along the flat tensor; 0: all.
    top: the largest finite value is stored as a number in (2^(top-1), 2^top]; below element.max."""

    element: FloatElement
    top: int
    block: int = 0
    unsigned: bool = False

    @property
    def storage(self) -> torch.dtype:
        """dtype of the stored data; UE6M10: its codes in int16."""
        return self.element.native or (torch.uint8 if self.element.bits <= 8 else torch.int16)


def _named(name: str) -> FloatElement:
    return cast(FloatElement, element(name))


# All exponents are numbers but for one code, NaN: 2^-40 … 2^33.
_UE6M10 = FloatElement(name="ue6m10", exponent_bits=6, fraction_bits=10, bias=31,
                       max_code=(1 << 16) - 2, signed=False)
FORMATS: Mapping[str, StateFormat] = {
    "f16": StateFormat(_named("f16"), top=15),
    "bf16": StateFormat(_named("bf16"), top=0),
    "e4m3": StateFormat(_named("e4m3"), top=8, block=256),
    "ue6m10": StateFormat(_UE6M10, top=32, unsigned=True),
    "ue5m3x": StateFormat(_named("ue5m3x"), top=16, block=256, unsigned=True),
}
FIRST = {"fp16": "f16", "bf16": "bf16", "fp8": "e4m3"}
SECOND = {"fp16": "ue6m10", "bf16": "bf16", "fp8": "ue5m3x"}


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent from its bits, exact on every device."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def shifted(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent in two steps, each a power of two that the dtype has."""
    half = exponent.to(torch.int32) >> 1
    return x * power(half, x.dtype) * power(exponent - half, x.dtype)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(x: Tensor, block: int) -> Tensor:
    """The flat tensor as [blocks, values of a block], the last padded with zeros."""
    size = block or max(x.numel(), 1)
    missing = -x.numel() % size
    flat = torch.nn.functional.pad(x.reshape(-1), (0, missing)) if missing else x.reshape(-1)
    return flat.view(-1, size)


def exponents_of(amax: Tensor, top: int) -> Tensor:
    """int32, shaped as ``amax``: the e with amax·2^-e in (2^(top-1), 2^top]; 0 where amax is 0.

    Rounding may move amax onto a power of two but not past it, so that what was decoded encodes to
    itself.
    """
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - (mantissa == 0.5).to(torch.int32) - top
    return torch.where(amax > 0, exponent, 0)


def encode_state(x: Tensor, fmt: StateFormat,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(data shaped as ``x``, exponents int16 [blocks]); rounded to nearest without ``generator``.

    Finite values stay finite, NaN stays NaN, ±Inf stays ±Inf. Negative in an unsigned format: NaN.
    """
    rows = rows_of(x.detach().to(work_dtype(x.dtype)), fmt.block)
    finite = finite_of(rows, fmt, x.dtype)
    exponent = exponents_of(finite.abs().amax(1, keepdim=True), fmt.top)
    bits = None if generator is None else random_bits(rows, generator)
    data = encode_rows(rows, finite, exponent, fmt, bits).view(-1)[:x.numel()]
    return data.view(x.shape), exponent.view(-1).to(torch.int16)


def limit_of(fmt: StateFormat, dtype: torch.dtype) -> float:
    """The element's largest value below 2^emax of ``dtype``: what would round up to Inf stops
    there."""
    return math.ldexp(1.0 - 2.0 ** -(fmt.element.fraction_bits + 1),
                      math.frexp(torch.finfo(dtype).max)[1])


def finite_of(rows: Tensor, fmt: StateFormat, dtype: torch.dtype) -> Tensor:
    """What of ``rows`` sets a scale: 0 for NaN and Inf, the rest within ``limit_of``."""
    limit = limit_of(fmt, dtype)
    return torch.where(rows.isfinite(), rows, 0.0).clamp(-limit, limit)


def random_bits(rows: Tensor, generator: torch.Generator) -> Tensor:
    """``RANDOM_BITS`` for each value, int32, in the order of the values."""
    return torch.randint(0, 1 << RANDOM_BITS, rows.shape, generator=generator, device=rows.device,
                         dtype=torch.int32)


def encode_rows(rows: Tensor, finite: Tensor, exponent: Tensor, fmt: StateFormat,
                bits: Tensor | None) -> Tensor:
    """Codes shaped as ``rows``, whose exponents broadcast; ``finite`` as of ``finite_of``."""
    item = fmt.element
    units = shifted(torch.where(rows.isfinite(), finite, rows), -exponent)
    if fmt.unsigned:
        units = torch.where(rows > 0, units.clamp(min=item.smallest), units)
        units = torch.where(rows < 0, torch.nan, units)
    return _codes(units, item, bits).to(fmt.storage)


def _codes(units: Tensor, item: FloatElement, bits: Tensor | None) -> Tensor:
    bounded = units if item.has_inf else units.clamp(-item.max, item.max)  # Inf is element.max
    if bits is not None:
        rounded = stochastic(bounded, item, Rounding("stochastic", RANDOM_BITS), bits)
        bounded = torch.where(bounded.isinf(), bounded, rounded)
    elif item.native is None:
        bounded = nearest(bounded, item)
    return bounded.to(item.native) if item.native is not None else encode(bounded, item)


def decode_state(data: Tensor, exponent: Tensor, fmt: StateFormat, dtype: torch.dtype) -> Tensor:
    """What ``encode_state`` stored, in ``dtype``."""
    values = rows_of(values_of(data, fmt, dtype), fmt.block)
    rows = shifted(values, exponent.view(-1, 1))
    return rows.view(-1)[:data.numel()].view(data.shape).to(dtype)


def values_of(data: Tensor, fmt: StateFormat, dtype: torch.dtype) -> Tensor:
    """What codes mean at exponent 0, in the dtype that ``dtype`` is computed in."""
    item = fmt.element
    codes = data.to(torch.int32) & 0xFFFF if data.dtype == torch.int16 else data
    values = decode(codes, item, work_dtype(dtype))
    if item.has_inf:
        return values
    return torch.where(values.abs() == item.max, values * torch.inf, values)
