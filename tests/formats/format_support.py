"""What the tests of formats share: elements to sweep, gfloat's view of them, telling inputs."""

from __future__ import annotations

import math

import numpy as np
import torch
from gfloat import Domain, FormatInfo

from scaleprop.formats.elements import (
    ELEMENTS,
    CodebookElement,
    ElementFormat,
    FloatElement,
    element,
)

GENERIC = ["e1m0", "e1m1", "e1m5", "e2m0", "e2m5", "e3m3", "e3m4", "e4m0", "e4m2", "e4m7", "e5m0",
           "e5m3", "e5m10", "e6m1", "e6m9", "e7m0", "e7m2", "e8m1", "e8m7", "e8m10"]
LITERALS = [name for name in ELEMENTS if name not in ("f32", "bf16", "f16")]
ALL = LITERALS + GENERIC
FLOATS = [name for name in ALL if isinstance(element(name), FloatElement)]
SMALL = [name for name in ALL if element(name).bits <= 9]


def gfloat_format(item: FloatElement) -> FormatInfo:
    """The same format, described to gfloat."""
    finite = item.magnitude_codes - 1 - item.max_code - item.has_inf
    return FormatInfo(
        name=item.name, k=item.bits, precision=item.fraction_bits + 1, bias=item.bias,
        has_nz=item.signed, domain=Domain.Extended if item.has_inf else Domain.Finite,
        num_high_nans=finite, has_subnormals=item.has_zero, is_signed=item.signed,
        is_twos_complement=False)


def grid(item: ElementFormat) -> list[float]:
    """Every finite value, ascending."""
    values = {item.decode(code) + 0.0 for code in item.codes}
    return sorted(value for value in values if item.min <= value <= item.max)


def telling_inputs(item: ElementFormat, limit: int = 3000) -> torch.Tensor:
    """float32: grid points, midpoints, the float32 neighbours of both, and beyond the ends."""
    values = grid(item)
    if len(values) > limit:  # keep the ends and every n-th value
        stride = len(values) // limit + 1
        values = sorted({*values[:64], *values[-64:], *values[::stride]})
    points = np.array(values)
    middles = (points[1:] + points[:-1]) / 2
    if isinstance(item, CodebookElement):
        middles = np.concatenate([middles, [b for b, _ in item.boundaries]])
    with np.errstate(over="ignore"):
        seeds = np.concatenate([points, middles, [item.max * 1.01, item.max * 3, item.min * 2]])
        seeds = seeds.astype(np.float32)
    seeds = np.concatenate([seeds, -seeds, np.float32([0.0, -0.0, 1e-45, 1e-38, 3.4e38])])
    seeds = seeds[np.isfinite(seeds)]
    up, down = np.nextafter(seeds, np.float32(math.inf)), np.nextafter(seeds, np.float32(-math.inf))
    every = np.concatenate([seeds, up, down])
    return torch.from_numpy(every[np.isfinite(every)])


def all_bfloat16() -> torch.Tensor:
    """Every finite bfloat16 number, as float32."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return values[values.isfinite()]


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, any NaN equal to any NaN, -0 to 0 (integers store no -0, fake_quantize keeps it)."""
    return bool(((a.isnan() & b.isnan()) | (a == b)).all())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, -0 told from 0, any NaN equal to any NaN."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())
