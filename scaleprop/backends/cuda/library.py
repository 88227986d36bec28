"""Products that the library has: ``torch.nn.functional.scaled_mm``, cuBLASLt on devices.

    float8   E4M3 × E4M3 or E5M2, a scale a row or one for all      compute capability 8.9 and up
    mx       MXFP8 × MXFP8                                          10.0 and up
    nv       NVFP4 × NVFP4                                          10.0 and up

Sums are float32 (no fast accumulation); scales are applied to them before the one rounding to the
result's dtype. A bias is added after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from scaleprop.backends.cuda.devices import BLOCK_SCALES, FLOAT8, Capability
from scaleprop.backends.cuda.layouts import swizzled
from scaleprop.formats.scaled import ScaledFormat

Kind = Literal["float8", "mx", "nv"]
_FLOAT8 = ("e4m3", "e5m2")
_BLOCKS = {"e4m3[1x32]*e8m0": "mx", "e2m1[1x16]*e4m3*f32": "nv"}
_MULTIPLE = 16  # of K and N


def kind_of(x: ScaledFormat | None, w: ScaledFormat, n: int, k: int,
            capability: Capability) -> Kind | None:
    """Which product of the library takes these operands on such a device; None where none does."""
    if x is None or n % _MULTIPLE or k % (_MULTIPLE if x.block is None else 2 * _MULTIPLE):
        return None
    return kind_of_formats(x, w, capability)


def kind_of_formats(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> Kind | None:
    """As ``kind_of``, of operands of a size that the library takes."""
    if capability >= FLOAT8 and all(map(_is_float8, (x, w))):
        both_wide = x.element.name == w.element.name == "e5m2"
        return None if both_wide else "float8"
    stems = {fmt.long_name.rpartition(":")[0] for fmt in (x, w)}
    kind: Any = _BLOCKS.get(stems.pop()) if len(stems) == 1 else None
    return kind if capability >= BLOCK_SCALES else None


def _is_float8(fmt: ScaledFormat) -> bool:
    return (fmt.element.name in _FLOAT8 and fmt.granularity.kind in ("tensor", "row")
            and fmt.scale.name == "f32" and not fmt.two_level)


def multiply(kind: Kind, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None,
             dtype: torch.dtype) -> Tensor:
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias[n]) of stored parts, in ``dtype``."""
    data = x[0].reshape(-1, x[0].shape[-1])
    call = _float8 if kind == "float8" else _blocks
    y = call(kind, [data, *x[1:]], w, dtype)
    y = y.reshape(*x[0].shape[:-1], y.shape[-1])
    return y if bias is None else (y + bias).to(dtype)


def _float8(kind: Kind, x: Sequence[Tensor], w: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One scale each, or one a row and a column; these the library applies to bfloat16 alone."""
    del kind
    m, n = x[0].shape[0], w[0].shape[0]
    tensor, row = ScalingType.TensorWise, ScalingType.RowWise
    if not (x[1].ndim or w[1].ndim):
        return scaled_mm(x[0], w[0].t(), x[1], tensor, w[1], tensor, output_dtype=dtype)
    scales = (x[1].reshape(-1, 1).expand(m, 1).contiguous(),
              w[1].reshape(1, -1).expand(1, n).contiguous())
    if dtype == torch.bfloat16:
        return scaled_mm(x[0], w[0].t(), scales[0], row, scales[1], row, output_dtype=dtype)
    one = torch.ones((), device=x[0].device)
    y = scaled_mm(x[0], w[0].t(), one, tensor, one, tensor, output_dtype=torch.float32)
    return (y * scales[0] * scales[1]).to(dtype)


def _blocks(kind: Kind, x: Sequence[Tensor], w: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    a, b = (part[0].view(torch.float4_e2m1fn_x2) if part[0].dtype == torch.uint8 else part[0]
            for part in (x, w))
    scales: list[Any] = [swizzled(part[1].reshape(-1, part[1].shape[-1])) for part in (x, w)]
    recipe: Any = ScalingType.BlockWise1x32
    swizzle: Any = SwizzleType.SWIZZLE_32_4_4
    if kind == "nv":
        scales = [[scale, part[2]] for scale, part in zip(scales, (x, w), strict=True)]
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        swizzle = [swizzle, SwizzleType.NO_SWIZZLE]
    return scaled_mm(a, b.t(), scales[0], recipe, scales[1], recipe, swizzle, swizzle,
                     output_dtype=dtype)
