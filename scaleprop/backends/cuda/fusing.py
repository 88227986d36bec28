"""Launching norms and activations whose results are only ever stored quantized."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from scaleprop.backends.cuda.constants import PACKED, element_constants
from scaleprop.backends.cuda.kernels import fused
from scaleprop.backends.cuda.launching import as_bytes, launch, programs
from scaleprop.backends.cuda.quantizing import element_of, levels_of, scaling_of
from scaleprop.errors import FormatError
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import storage_layout

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")
NORMS = ("none", "rms", "layer")
RANGES, GROUPS, ROW, TENSOR = 0, 1, 2, 3  # what a launch does
COLUMNS, ELEMENTS = 2048, 1024  # of a program: at most, at least
_DTYPES = {None: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def norm_quantize(
    x: Tensor, fmt: ScaledFormat, kind: Literal["rms", "layer"], gain: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-6, between: torch.dtype | None = None,
    within: torch.dtype | None = None, result: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The stored parts of x [M, K] normalised by rows: x/√(mean x² + eps), or
    (x − mean)/√(var + eps), times ``gain`` [K], plus ``bias`` [K].

    All in float32, and then rounded to ``between``, which the graph's next operator reads; before
    gain and bias to ``within``, too, where that is given. result: float32 [M, K], to which what is
    quantized is written, too. A row's sums do not depend on how many rows there are.

    Raises:
        FormatError: for formats and arguments that no kernel has.
    """
    if kind not in NORMS[1:]:
        raise FormatError(f"norm {kind!r}: 'rms' or 'layer'")
    for name, part in (("gain", gain), ("bias", bias)):
        if part is not None and (part.shape != x.shape[-1:] or not part.is_contiguous()):
            raise FormatError(f"{name} is {list(part.shape)}: pass [{x.shape[-1]}], contiguous")
    return _quantized(
        x, x, x if gain is None else gain, x if bias is None else bias, fmt, result,
        NORM=NORMS.index(kind), FUNCTION="", GATED=False, GAIN=gain is not None,
        BIAS=bias is not None, EPS=eps, BETWEEN=_place(between), WITHIN=_place(within))


def activation_quantize(x: Tensor, fmt: ScaledFormat, activation: str,
                        between: torch.dtype | None = None,
                        result: Tensor | None = None) -> list[Tensor]:
    """The stored parts of f(x), x [M, K], f one of ``ACTIVATIONS``; the rest as in
    ``norm_quantize``.

    Raises:
        FormatError: for formats and arguments that no kernel has.
    """
    return _activated(x, x, fmt, activation, False, between, result)


def gated_quantize(gate: Tensor, up: Tensor, fmt: ScaledFormat, activation: str,
                   between: torch.dtype | None = None,
                   result: Tensor | None = None) -> list[Tensor]:
    """The stored parts of f(gate)·up, both [M, K]: of SwiGLU with "silu". f(gate) is rounded to
    ``between``, and so is the product; the rest as in ``norm_quantize``.

    Raises:
        FormatError: for formats and arguments that no kernel has.
    """
    if gate.shape != up.shape:
        raise FormatError(f"gate is {list(gate.shape)}, up is {list(up.shape)}: pass one shape")
    return _activated(gate, up, fmt, activation, True, between, result)


def _activated(x: Tensor, up: Tensor, fmt: ScaledFormat, activation: str, gated: bool,
               between: torch.dtype | None, result: Tensor | None) -> list[Tensor]:
    if activation not in ACTIVATIONS:
        raise FormatError(f"no kernel computes {activation!r}: one of {', '.join(ACTIVATIONS)}")
    place = _place(between)
    return _quantized(x, up, x, x, fmt, result, NORM=0, FUNCTION=activation, GATED=gated,
                      GAIN=False, BIAS=False, EPS=0.0, BETWEEN=place, WITHIN=place)


def _place(dtype: torch.dtype | None) -> int:
    if dtype not in _DTYPES:
        raise FormatError(f"cannot round to {dtype} between: float32, float16 or bfloat16")
    return _DTYPES[dtype]


def tile_of(fmt: ScaledFormat, k: int) -> tuple[int, int]:
    """Rows and columns of a program, by K alone."""
    columns = min(max(1 << (max(k, 1) - 1).bit_length(), 128), COLUMNS)
    columns = max(columns, fmt.block[1] if fmt.block else 1)
    return max(ELEMENTS // columns, 1), columns


def _quantized(x: Tensor, up: Tensor, gain: Tensor, bias: Tensor, fmt: ScaledFormat,
               result: Tensor | None, **constants: Any) -> list[Tensor]:
    """Finds the tensor's range first where the format needs it."""
    _check(x, fmt)
    m, k = x.shape
    if result is not None and (result.shape != x.shape or result.dtype != torch.float32
                               or not result.is_contiguous()):
        raise FormatError(f"result is {result.dtype} {list(result.shape)}: pass float32 {[m, k]}, "
                          "contiguous")
    rows, columns = tile_of(fmt, k)
    parts = [torch.empty(size, dtype=dtype, device=x.device)
             for size, dtype in storage_layout(fmt, x.shape)]
    data, scales, last = (as_bytes(part) for part in (*parts[:2], parts[-1]))
    ranges = torch.zeros(3, dtype=torch.int32, device=x.device)
    mode = GROUPS if fmt.block else ROW if fmt.granularity.kind == "row" else TENSOR
    # rows of a norm, and those that share a scale, are a program's own; others may be cut
    whole = bool(constants["NORM"]) or mode == ROW
    span = max(k, 1) if whole else columns
    for step in (RANGES, mode) if fmt.two_level or mode == TENSOR else (mode,):
        launch(
            fused.fused_kernel, (programs(m, rows), programs(k, span)), x, up, gain, bias, ranges,
            data, scales, last, last if fmt.two_level else ranges, x if result is None else result,
            m, k, span, *x.stride(), *up.stride(), data.shape[-1],
            scales.shape[-1] if scales.ndim else 1, E=element_of(fmt, x.device),
            S=scaling_of(fmt, x.device), C=fmt.block[1] if fmt.block else 1, LEVELS=levels_of(fmt),
            MODE=step, KEEP=result is not None, ROWS=rows, COLUMNS=columns, **constants)
    return parts


def takes(fmt: ScaledFormat) -> bool:
    """Whether a kernel computes and quantizes in this format."""
    if fmt.block:
        c = fmt.block[1]
        return fmt.block[0] == 1 and not c & (c - 1) and c <= COLUMNS and not fmt.zero_point
    return (fmt.granularity.kind in ("row", "tensor") and fmt.scale.name == "f32"
            and not fmt.two_level)


def _check(x: Tensor, fmt: ScaledFormat) -> None:
    if x.ndim != 2:
        raise FormatError(f"x is {list(x.shape)}: pass [M, K]")
    if not takes(fmt) or element_constants(fmt.element).bits not in PACKED:
        raise FormatError(f"{fmt.long_name!r}: no kernel computes and quantizes in it; [1x2ⁿ] "
                          "groups without zero points, or float32 scales of rows or the tensor")
