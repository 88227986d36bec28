"""Casts and matrix products of training graphs: data alone, its exponents known to the graph.

Passes insert these into joint forward and backward graphs, where nothing is differentiated any
more; they have no gradient of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats import elements
from scaleprop.formats.rounding import nearest, power_of_two_below

MOST = 2.0**100  # scales beyond would not be float32 numbers together with their reciprocals


def float_element(name: str) -> elements.FloatElement:
    """A float element that torch has a dtype for.

    Raises:
        FormatError: for other elements.
    """
    found = elements.element(name)
    if not isinstance(found, elements.FloatElement) or found.storage == torch.uint8:
        raise FormatError(f"{name!r} has no torch dtype to cast to: use e4m3 or e5m2")
    return found


def cast(x: Tensor, element: str) -> Tensor:
    """``x`` rounded to nearest even in ``element``'s own dtype; beyond its range saturated.

    NaN stays NaN. Raises ``FormatError`` for an element that torch has no dtype for.
    """
    fmt = float_element(element)
    if x.dtype == torch.float64:  # torch rounds to float32 on the way
        x = nearest(x, fmt)
    return x.clamp(-fmt.max, fmt.max).to(fmt.storage)


def gemm(a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha·(a @ b), [m, k] × [k, n] of low-precision data, summed in float32, in ``dtype``."""
    # alpha first: it is a power of two, and here it is part of the conversion
    return torch.mm(a.to(torch.float32) * alpha, b.to(torch.float32)).to(dtype)


def power_scale(x: Tensor, element: str, margin: int) -> Tensor:
    """The power of two s that brings the largest |x|/s within 2^margin of ``element``'s maximum.

    A scalar of float32: 1 where x is all zeros, or holds NaN or Inf.
    """
    fmt = float_element(element)
    amax = x.abs().amax().to(torch.float32) if x.numel() else x.new_zeros((), dtype=torch.float32)
    scale = power_of_two_below(amax) * 2.0 ** (margin + 1 - fmt.emax)
    usable = (amax > 0) & (amax < torch.inf)
    return torch.where(usable, scale.clamp(1.0 / MOST, MOST), 1.0)
