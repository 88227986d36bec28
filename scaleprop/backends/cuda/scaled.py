"""Launching products of MX blocks in units that take block scales: of what, in which tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaleprop.backends.cuda import products
from scaleprop.backends.cuda.constants import stored_constants
from scaleprop.backends.cuda.devices import (
    TENSOR_MEMORY,
    Capability,
    capability_of,
    has_block_units,
)
from scaleprop.backends.cuda.kernels import scaled as kernels
from scaleprop.backends.cuda.kernels.products import sum_kernel
from scaleprop.backends.cuda.launching import Parts, as_bytes, launch, programs
from scaleprop.backends.cuda.layouts import swizzled
from scaleprop.errors import FormatError
from scaleprop.formats.scaled import ScaledFormat

ELEMENTS = ("e2m1", "e4m3", "e5m2")
_FEW = 64  # rows at most, of which yᵀ is computed
_ROWS, _COLUMNS, _LEAST = 128, 128, 16  # of a tile: on one side of the units, and on the other
_TILE = 4  # columns of scales in a tile of theirs


class Way(NamedTuple):
    """Names of elements, and the kernel's constants besides."""

    x: str
    w: str
    few: bool
    tiled: bool

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernel takes them."""
        return {"X": self.x, "W": self.w, "FEW": self.few, "TILED": self.tiled}


def takes(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> bool:
    """Whether a device multiplies these as they are stored: MX blocks, any two of E2M1, E4M3 and
    E5M2 on 10.x and 11.x, of one width on 12.x."""
    return all(map(_is_block, (x, w))) and has_block_units(capability, mixed=x.bits != w.bits)


def _is_block(fmt: ScaledFormat) -> bool:
    return (fmt.element.name in ELEMENTS and fmt.block == (1, 32) and fmt.scale.name == "e8m0"
            and not fmt.two_level)


def way_of(x: ScaledFormat, w: ScaledFormat, m: int, capability: Capability) -> Way:
    """The way for operands of these formats and so many rows: tiles are for ``tcgen05.mma``."""
    few = m <= _FEW
    tiled = not few and capability[0] in TENSOR_MEMORY
    return Way(x.element.name, w.element.name, few, tiled)


def multiply(
    x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, x_format: ScaledFormat,
    w_format: ScaledFormat, k: int, dtype: torch.dtype = torch.float32,
    splits: int | None = None, tiled: bool | None = None,
) -> Tensor:  # fmt: skip
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias[n]), in ``dtype``: ``scaleprop::scaled_mm``.

    splits: of K. tiled: whether scales of more than 64 rows are put in tiles first, which is a pass
    over them. None: for the device. Sums are the units' own, in float32; with the bias, they are
    rounded once.

    Raises:
        FormatError: for formats that are not of ``ELEMENTS`` in blocks [1x32] with E8M0 scales.
    """
    if not all(map(_is_block, (x_format, w_format))):
        raise FormatError(f"no units multiply {x_format} × {w_format}: blocks of 32, scales of "
                          f"E8M0, elements {', '.join(ELEMENTS)}")
    left, right = Parts.of(x, x_format), Parts.of(w, w_format)
    m, n = left.data.shape[0], right.data.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=left.data.device)
    way = way_of(x_format, w_format, m, capability_of(out.device))
    way = way if tiled is None or way.few else way._replace(tiled=tiled)
    count = products.splits_for(m, n, k, _COLUMNS, out.device) if splits is None else splits
    added = right.data if bias is None else bias.contiguous()
    final = as_bytes(out)
    target = final if count == 1 else torch.empty(count, m, n, device=out.device)
    _run(way, left, right, added, target, (m, n, k), count, bias is not None)
    if count > 1:
        rows, columns = products.SUM_TILE
        launch(sum_kernel, (programs(m, rows), programs(n, columns)), target,
               *left[1:], right.scales, right.outer, right.data, added, final, m, n,
               X=None, W=stored_constants(w_format), X_AT=products.PLAIN, W_AT=products.FOLDED,
               DOT=tl.float32, BIAS=bias is not None, SPLITS=count, ROWS=rows, COLUMNS=columns)
    return out.reshape(*x[0].shape[:-1], n)


def _run(way: Way, left: Parts, right: Parts, added: Tensor, target: Tensor,
         sizes: tuple[int, int, int], count: int, bias: bool) -> None:
    m, n, k = sizes

    def grid(meta: Mapping[str, Any]) -> tuple[int, int]:
        return programs(m, meta["ROWS"]) * programs(n, meta["COLUMNS"]), count

    fixed = products.interpreted() or torch.are_deterministic_algorithms_enabled()
    bucket = products.bucket_of(m)
    (x_scales, x_width), (w_scales, w_width) = (_scales(parts, way) for parts in (left, right))
    launch(kernel_of(bucket, way, fixed), grid, left.data, x_scales, right.data, w_scales, added,
           target, m, n, k, left.data.stride(0), x_width, right.data.stride(0), w_width,
           products.key_of(bucket, way), **way.constants, BIAS=bias, SPLITS=count)


def _scales(parts: Parts, way: Way) -> tuple[Tensor, int]:
    """As the kernel reads them, and how many, or tiles, are in a row."""
    width = parts.scales.shape[-1]
    return (swizzled(parts.scales), -(-width // _TILE)) if way.tiled else (parts.scales, width)


def tiles_for(way: Way, bucket: int) -> Iterator[triton.Config]:
    """Tiles to try for so many rows; the first is taken where nothing is tried. Four warps read the
    scales of 128 by 128 in words, which can be ahead of the products; where the units' results are
    in registers, they need eight."""
    if way.few:
        for depth, stages in ((128, 4), (256, 4), (256, 3), (512, 3)):
            yield products.config_of(max(bucket, _LEAST), _COLUMNS, depth, 4, stages)
    elif way.tiled:
        for columns, depth, warps, stages in ((128, 128, 4, 3), (128, 128, 4, 4), (128, 256, 8, 3),
                                              (256, 128, 8, 4), (256, 256, 8, 3)):
            yield products.config_of(_ROWS, columns, depth, warps, stages)
    else:
        for columns, depth, warps, stages in ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 3),
                                              (64, 256, 8, 2)):
            yield products.config_of(_ROWS, columns, depth, warps, stages)


@functools.cache
def kernel_of(bucket: int, way: Way, fixed: bool) -> Any:
    """As ``products.kernel_of``."""
    configs = list(tiles_for(way, bucket))
    return triton.autotune(configs[:1] if fixed else configs, cache_results=True,
                           key=["N", "K", "SPLITS", "BIAS", "key"])(kernels.scaled_kernel)
