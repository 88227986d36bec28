"""Launching what quantizes lines of a matrix in tiles: along rows, along columns, or both."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from scaleprop.backends.cuda.constants import scaling_constants
from scaleprop.backends.cuda.kernels import lines
from scaleprop.backends.cuda.launching import as_bytes, launch, programs
from scaleprop.backends.cuda.quantizing import line_element, quantize_rows, tensor_ranges
from scaleprop.errors import FormatError
from scaleprop.formats.rounding import has_nan
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import storage_layout

TILE = {"ROWS": 64, "COLUMNS": 128}
WARPS = 16  # 16 elements a thread


def quantize_lines(x: Tensor, fmt: ScaledFormat, axes: Collection[int] = (1,),
                   tensor_amax: Tensor | None = None) -> list[list[Tensor]]:
    """For each of ``axes``, 0 or 1, the stored parts of ``x`` [M, K] quantized along it, with one
    scale a row (of xᵀ along 0) or a tensor, to nearest.

    tensor_amax: a float32 scalar on x's device in place of the data's amax, for the scale of the
    whole tensor. Data beyond saturate; Inf becomes NaN, as in ``scaleprop.ops.quantize_operand``.

    Raises:
        FormatError: for granularities, elements and rules that no kernel has; for an amax that has
            no use, or comes with an element that has no NaN.
    """
    element = line_element(x, fmt, "quantize_lines")
    if fmt.zero_point:
        raise FormatError(f"{fmt.long_name!r}: quantize_lines takes no zero points")
    if tensor_amax is not None:
        _check_amax(tensor_amax, fmt)
    if x.stride(0) < x.stride(1):  # tiles are wide along what is near in memory
        return quantize_lines(x.t(), fmt, [1 - axis for axis in axes], tensor_amax)
    if 0 not in axes and tensor_amax is None:
        return [quantize_rows(x, fmt) for _ in axes]
    sides = {axis: _empty(x if axis else x.t(), fmt) for axis in axes}
    some = next(iter(sides.values()))
    (data, scales), (data_t, scales_t) = (map(as_bytes, sides.get(axis, some)) for axis in (1, 0))
    launch(lines.lines_kernel, _grid(x), x, *_ranges(x, fmt, axes, tensor_amax), data, scales,
           data_t, scales_t, *x.shape, *x.stride(), data.shape[1], data_t.shape[1], E=element,
           **constants_of(fmt, axes, tensor_amax is not None), num_warps=WARPS)
    return [sides[axis] for axis in axes]


def constants_of(fmt: ScaledFormat, axes: Collection[int], given: bool) -> dict[str, Any]:
    """Of the kernel that stores codes, but for the element."""
    return {"S": scaling_constants(fmt), "WHOLE": fmt.granularity.kind == "tensor", "GIVEN": given,
            "ALONG": 1 in axes, "ACROSS": 0 in axes, **TILE}


def _check_amax(amax: Tensor, fmt: ScaledFormat) -> None:
    if fmt.granularity.kind != "tensor":
        raise FormatError(f"{fmt.long_name!r}: tensor_amax is for one scale of the whole tensor")
    if amax.ndim:
        raise FormatError(f"tensor_amax is {list(amax.shape)}: pass a scalar")
    if not has_nan(fmt.element):
        raise FormatError(f"{fmt.long_name!r}: with tensor_amax Inf and NaN in the data are stored "
                          f"as NaN, which {fmt.element.name} lacks")


def _empty(x: Tensor, fmt: ScaledFormat) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=x.device)
            for shape, dtype in storage_layout(fmt, x.shape)]


def _ranges(x: Tensor, fmt: ScaledFormat, axes: Collection[int],
            amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """int32 bits of the largest magnitudes: of rows [M] and columns [K], or twice the tensor's."""
    if fmt.granularity.kind == "tensor":
        found = tensor_ranges(x) if amax is None else amax.to(torch.float32).view(torch.int32)
        return found, found
    m, k = x.shape
    most, most_t = torch.zeros(m + k, dtype=torch.int32, device=x.device).split((m, k))
    launch(lines.line_ranges_kernel, _grid(x), x, most, most_t, m, k, *x.stride(),
           ALONG=1 in axes, ACROSS=0 in axes, **TILE, num_warps=WARPS)
    return most, most_t


def _grid(x: Tensor) -> tuple[int, int]:
    return programs(x.shape[0], TILE["ROWS"]), programs(x.shape[1], TILE["COLUMNS"])
