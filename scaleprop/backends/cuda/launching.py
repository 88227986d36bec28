"""What every launch shares: grids, and parts of formats as the bytes that kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaleprop.formats.scaled import ScaledFormat

_BYTES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8}


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """On the first argument's device. Products and sums are not fused: each is rounded, as the
    reference rounds it."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def programs(size: int, tile: int) -> int:
    """How many tiles cover ``size``; at least one."""
    return max(-(-size // tile), 1)


def as_bytes(x: Tensor) -> Tensor:
    """Float8 and int8 as bytes, bfloat16 as its bits in int16; others as they are."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16)
    return x.view(torch.uint8) if x.dtype in _BYTES else x


def matrix_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Parts(NamedTuple):
    """Stored parts of a matrix for kernels; what a format lacks is stood in for."""

    data: Tensor
    scales: Tensor
    zeros: Tensor
    outer: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor], fmt: ScaledFormat) -> Parts:
        """From [data, scale, (tensor scale), (zero point)]; data of more axes becomes [M, K]."""
        data, scales, *rest = (as_bytes(part) for part in parts)
        flat = scales if scales.ndim < 2 else matrix_of(scales)
        return cls(matrix_of(data).contiguous(), flat.contiguous(),
                   rest[-1].contiguous() if fmt.zero_point else data,
                   rest[0] if fmt.two_level else scales)
