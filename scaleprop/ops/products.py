"""Casts and matrix products of training graphs: data alone, its exponents known to the graph.

Passes insert these into joint forward and backward graphs, where nothing is differentiated any
more; they have no gradient of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats import elements
from scaleprop.formats.rounding import nearest, power_of_two_below

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SHORT = {*_FP8, torch.bfloat16}  # exact in bfloat16
_UNITS = threading.Lock()  # who reads the switch while it is set would leave it so
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

    NaN stays NaN, and Inf becomes it: loss scaling, and whoever skips a bad step, must see an
    overflow. Raises ``FormatError`` for an element that torch has no dtype for.
    """
    fmt = float_element(element)
    # torch rounds float64 to float32 on the way
    rounded = nearest(x, fmt) if x.dtype == torch.float64 else x
    top = min(fmt.max, torch.finfo(x.dtype).max)  # float16 has no room for bfloat16's largest
    return (rounded.clamp(-top, top) + x * 0.0).to(fmt.storage)  # 0·Inf is NaN


def gemm(a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha·(a @ b), [m, k] × [k, n] of low-precision data, summed in float32, in ``dtype``.

    On CUDA, ranges of k whose sums are added up in bfloat16, where that is the dtype, are allowed
    or not by ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``, as in a model
    of bfloat16.
    """
    if in_hardware(a, b):
        return scaled_gemm(a, b, alpha, dtype)
    if not has_bfloat16(a.device) or not {a.dtype, b.dtype} <= _SHORT:
        # alpha first: it is a power of two, and here it is part of the conversion
        return torch.mm(a.to(torch.float32) * alpha, b.to(torch.float32)).to(dtype)
    if a.dtype in _FP8 and _fits(alpha):
        a, alpha = a.to(torch.bfloat16) * alpha, 1.0
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    if alpha == 1.0 and dtype == torch.bfloat16:
        return torch.mm(a, b)  # sums in float32, in matrix units where there are any
    if a.device.type == "cpu":
        product: Tensor = torch.ops.scaleprop.wide_mm(a, b)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
    return (product if alpha == 1.0 else product * alpha).to(dtype)


def _fits(alpha: float) -> bool:
    """Whether all FP8 numbers times ``alpha`` are normal numbers of bfloat16."""
    return math.frexp(alpha)[0] == 0.5 and 2.0**-80 <= alpha <= 2.0**80


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [m, k] × [k, n] of bfloat16 data, summed in float32, in float32.

    Converted to float32 the factors still are bfloat16 numbers, so CPUs that have matrix units for
    these may multiply there, and lose nothing (but numbers below 2^-126, which count as 0). torch
    has one switch for that in a process: float32 products that another thread begins meanwhile have
    their factors rounded.
    """
    with _UNITS:
        switch: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
        before, switch.fp32_precision = switch.fp32_precision, "bf16"
        try:
            return torch.mm(a.to(torch.float32), b.to(torch.float32))
        finally:
            switch.fp32_precision = before


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are summed in float32 on a device, and not slower for it: on
    CPUs, and CUDA of compute capability 8.0 or more."""
    return device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def in_hardware(a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies this data as it is: not two factors of E5M2."""
    fp8 = all(x.dtype in _FP8 for x in (a, b)) and torch.float8_e4m3fn in (a.dtype, b.dtype)
    return fp8 and has_fp8(a.device)


def has_fp8(device: torch.device) -> bool:
    """Whether a device has matrix units for FP8: CUDA of compute capability 8.9 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_gemm(a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """``gemm`` through ``torch._scaled_mm``, for FP8 data of which one at least is E4M3.

    That wants ``a`` in rows, ``b`` in columns, k and n multiples of 16, and gives no float64:
    what is laid out otherwise is copied, what is missing is zeros.
    """
    k, n = b.shape
    rows = _padded(a, (0, -k % 16))
    columns = _padded(b.t(), (0, -k % 16, 0, -n % 16))
    scale = torch.full((), alpha, dtype=torch.float32, device=a.device)
    out = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    product: Tensor = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage]
        rows, columns.t(), scale, torch.ones_like(scale), out_dtype=out)
    return product[:, :n].to(dtype)


def _padded(x: Tensor, widths: Sequence[Any]) -> Tensor:
    """``x`` with zeros after its end, contiguous; as bytes, which every device pads. Symbolic
    sizes are padded without a look: no guard is added."""
    if any(isinstance(width, torch.SymInt) or width for width in widths):
        x = torch.nn.functional.pad(x.contiguous().view(torch.uint8), widths).view(x.dtype)
    return x.contiguous()


def power_scale(x: Tensor, element: str, margin: int) -> Tensor:
    """The power of two s that brings the largest |x|/s within 2^margin of ``element``'s maximum.

    A scalar of float32: 1 where x is all zeros, or holds NaN or Inf.
    """
    fmt = float_element(element)
    amax = x.abs().amax().to(torch.float32) if x.numel() else x.new_zeros((), dtype=torch.float32)
    scale = power_of_two_below(amax) * 2.0 ** (margin + 1 - fmt.emax)
    usable = (amax > 0) & (amax < torch.inf)
    return torch.where(usable, scale.clamp(1.0 / MOST, MOST), 1.0)
