"""Products that the library has: ``torch.nn.functional.scaled_mm``, cuBLASLt on devices.

    float8          E4M3 × E4M3, E5M2 × E4M3, a scale a row or one for    from 8.9 on
                    all; E4M3 × E5M2 with one for all
    float8_blocks   E4M3 × E4M3, a scale for 1×128 or, of one, 128×128    9.0, from CUDA 12.9 on
    mx              MXFP8 × MXFP8                                         from 10.0 on
    nv              NVFP4 × NVFP4                                         from 10.0 on

Numbers of devices are compute capabilities. Tiles of several rows (16×16 of NVFP4 weights) are
blocks whose rows have one scale. Sums are float32 (no fast accumulation); scales are applied to
them before the one rounding to the result's dtype. A bias is added after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from scaleprop.backends.cuda.devices import BLOCK_SCALES, FLOAT8, FLOAT8_BLOCKS, Capability
from scaleprop.backends.cuda.layouts import columns_first, padded_tiles, swizzled
from scaleprop.formats.scaled import ScaledFormat

Kind = Literal["float8", "float8_blocks", "mx", "nv"]
_FLOAT8 = ("e4m3", "e5m2")
_LONG = 128  # columns of float8 blocks
_BLOCKS: dict[tuple[str, int, str, bool], Kind] = {
    ("e4m3", 32, "e8m0", False): "mx", ("e2m1", 16, "e4m3", True): "nv"}
_MULTIPLE = 16  # of K and N
_SCALES = 4  # of float32 in 16 bytes
_CUDA_OF_BLOCKS = (12, 9)


def kind_of(x: ScaledFormat | None, w: ScaledFormat, n: int, k: int,
            capability: Capability) -> Kind | None:
    """Which product of the library takes these operands on such a device; None where none does."""
    if x is None or n % _MULTIPLE or k % (_MULTIPLE if x.block is None else 2 * _MULTIPLE):
        return None
    return kind_of_formats(x, w, capability)


def kind_of_formats(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> Kind | None:
    """As ``kind_of``, of operands of a size that the library takes."""
    if all(map(is_float8, (x, w))):
        return _float8_kind(x, w, capability)
    kind, other = map(_blocks_kind, (x, w))
    return kind if kind == other and capability >= BLOCK_SCALES else None


def _blocks_kind(fmt: ScaledFormat) -> Kind | None:
    return _BLOCKS.get((fmt.element.name, fmt.granularity.columns, fmt.scale.name, fmt.two_level))


def _float8_kind(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> Kind | None:
    wide = [fmt.element.name == "e5m2" for fmt in (x, w)]
    if all(wide):
        return None
    if x.block is None and w.block is None:
        by_row = "row" in (x.granularity.kind, w.granularity.kind)
        there = capability >= FLOAT8 and not (by_row and wide[1])
        return "float8" if there else None
    blocks = _long(x) and _long(w) and not (_square(x) and _square(w)) and not any(wide)
    there = capability == FLOAT8_BLOCKS and _cuda() >= _CUDA_OF_BLOCKS
    return "float8_blocks" if blocks and there else None


def takes_rows(kind: Kind, m: int, x: ScaledFormat) -> bool:
    """Whether the library's product takes so many rows of x: scales of 1×128, of which neighbours
    are of neighbouring rows, it reads 16 bytes at a time."""
    return kind != "float8_blocks" or _square(x) or m % _SCALES == 0


def is_float8(fmt: ScaledFormat) -> bool:
    """Whether values are E4M3 or E5M2 under float32 scales of one level."""
    return fmt.element.name in _FLOAT8 and fmt.scale.name == "f32" and not fmt.two_level


def _long(fmt: ScaledFormat) -> bool:
    return fmt.block in ((1, _LONG), (_LONG, _LONG))


def _square(fmt: ScaledFormat) -> bool:
    return fmt.block == (_LONG, _LONG)


def _cuda() -> tuple[int, ...]:
    """The version that torch is built with; none is before all."""
    return tuple(map(int, (torch.version.cuda or "0").split(".")))


def multiply(
    kind: Kind, x: Sequence[Tensor], w: Sequence[Tensor], x_format: ScaledFormat,
    w_format: ScaledFormat, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias[n]) of stored parts, in ``dtype``."""
    left, right = [x[0].reshape(-1, x[0].shape[-1]), *x[1:]], list(w)
    match kind:
        case "float8":
            y = _float8(left, right, dtype)
        case "float8_blocks":
            y = _float8_blocks(left, right, (x_format, w_format), dtype)
        case _:
            y = _blocks(kind, left, right, (x_format, w_format), dtype)
    y = y.reshape(*x[0].shape[:-1], y.shape[-1])
    return y if bias is None else (y + bias).to(dtype)


def _float8(x: Sequence[Tensor], w: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One scale each, or one a row and a column; these the library applies to bfloat16 alone."""
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


def _float8_blocks(x: Sequence[Tensor], w: Sequence[Tensor],
                   formats: Sequence[ScaledFormat], dtype: torch.dtype) -> Tensor:
    scales: list[Tensor] = []
    recipes: list[ScalingType] = []
    for parts, fmt in zip((x, w), formats, strict=True):
        scale = parts[1].reshape(-1, parts[1].shape[-1])
        scales.append(padded_tiles(scale) if _square(fmt) else columns_first(scale))
        recipes.append(ScalingType.BlockWise128x128 if _square(fmt)
                       else ScalingType.BlockWise1x128)
    kept = dtype if dtype == torch.bfloat16 else torch.float32
    y = scaled_mm(x[0], w[0].t(), scales[0], recipes[0], scales[1], recipes[1],
                  SwizzleType.NO_SWIZZLE, SwizzleType.NO_SWIZZLE, output_dtype=kept)
    return y.to(dtype)


def _blocks(kind: Kind, x: Sequence[Tensor], w: Sequence[Tensor], formats: Sequence[ScaledFormat],
            dtype: torch.dtype) -> Tensor:
    a, b = (part[0].view(torch.float4_e2m1fn_x2) if part[0].dtype == torch.uint8 else part[0]
            for part in (x, w))
    scales: list[Any] = [swizzled(_by_row(part, fmt))
                         for part, fmt in zip((x, w), formats, strict=True)]
    recipe: Any = ScalingType.BlockWise1x32
    swizzle: Any = SwizzleType.SWIZZLE_32_4_4
    if kind == "nv":
        scales = [[scale, part[2]] for scale, part in zip(scales, (x, w), strict=True)]
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        swizzle = [swizzle, SwizzleType.NO_SWIZZLE]
    return scaled_mm(a, b.t(), scales[0], recipe, scales[1], recipe, swizzle, swizzle,
                     output_dtype=_kept(dtype)).to(dtype)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What the library rounds to, of results in ``dtype``."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _by_row(parts: Sequence[Tensor], fmt: ScaledFormat) -> Tensor:
    """Scales of each row of a matrix, [M, blocks]."""
    scale = parts[1].reshape(-1, parts[1].shape[-1])
    rows = fmt.granularity.rows
    if rows == 1:
        return scale
    codes = scale.view(torch.uint8).repeat_interleave(rows, 0)[: len(parts[0])]
    return codes.view(scale.dtype)
