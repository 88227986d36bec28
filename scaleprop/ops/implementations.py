"""What each operator computes, in plain ATen: functional, traceable, symbolic sizes allowed.

The CPU kernels of ``scaleprop::*`` call these; a compiler may trace them (``make_fx``) in place of
the operators. None reads the data to decide what to do. ``IMPLEMENTATIONS`` maps each operator
overload's name to its function, which takes the operator's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.quantize import check_input, fake_quantize_tensor, quantize_parts
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN, ScaledFormat, parse
from scaleprop.formats.tensor import dequantize_parts, storage_layout
from scaleprop.ops import operands, products, steps
from scaleprop.ops.hadamard import hadamard

_CHUNK = 1 << 18  # values of a weight that are in float64 at a time: they stay in cache


def quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
             bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The stored parts of ``x``: data, scale, (tensor scale), (zero point)."""
    mode = parse_rounding(rounding)
    check_input(x, axis, mode, bits)
    return quantize_parts(x, parse(format), axis, mode, bits, scales)


def dequantize(parts: Sequence[Tensor], format: str, shape: Sequence[Any], axis: int = -1,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """x̂ of these parts, of this logical shape."""
    fmt = parse(format)
    check_parts(parts, fmt)
    return dequantize_parts(parts, fmt, shape, axis, dtype)


def fake_quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                  bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> Tensor:
    """dequantize(quantize(x)), in x's dtype."""
    mode = parse_rounding(rounding)
    check_input(x, axis, mode, bits)
    return fake_quantize_tensor(x, parse(format), axis, mode, bits, scales)


def check_parts(parts: Sequence[Tensor], fmt: ScaledFormat) -> None:
    """Raise ``FormatError`` unless there are as many parts as the format has."""
    if len(parts) != fmt.parts_count:
        raise FormatError(f"format {str(fmt)!r} has {fmt.parts_count} parts (data, scale"
                          f"{', tensor scale' * fmt.two_level}{', zero point' * fmt.zero_point}), "
                          f"not {len(parts)}")


def is_int(size: Any) -> bool:
    """Whether a size is known."""
    return isinstance(size, int)


def operand(parts: Sequence[Tensor], format: str, k: Any, dtype: torch.dtype) -> Tensor:
    """x̂ [..., k] of an operand of ``scaled_mm``, in ``dtype``.

    Raises:
        FormatError: where the parts do not fit the format, or their last axis is not k.
    """
    if format in PLAIN:
        if len(parts) != 1 or not parts[0].is_floating_point():
            raise FormatError(f"an operand of format {format!r} is one float tensor")
        expected: Any = parts[0].shape[-1]
        if is_int(k) and is_int(expected) and k != expected:
            raise FormatError(f"scaled_mm: k is {k}, but an operand's last axis has {expected}")
        return parts[0].to(dtype)
    fmt = parse(format)
    check_parts(parts, fmt)
    shape = (*parts[0].shape[:-1], k)
    stored = storage_layout(fmt, shape)[0][0][-1]
    if is_int(stored) and stored != parts[0].shape[-1]:
        raise FormatError(f"scaled_mm: {k} elements of {str(fmt)!r} take a last axis of {stored}, "
                          f"but the data has {parts[0].shape[-1]}")
    return dequantize_parts(parts, fmt, shape, -1, dtype)


def scaled_mm(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, x_format: str,
              w_format: str, k: Any) -> Tensor:
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias[n]), float32.

    x̂ and ŵ are exact (not rounded to float32); products and sum are float64, rounded once to
    float32; the bias is added in float32.
    """
    left = operand(x, x_format, k, torch.float64)
    products: list[Tensor] = []
    for rows in _row_chunks(w, w_format):
        right = operand(rows, w_format, k, torch.float64)
        if right.ndim != 2:
            raise FormatError(f"scaled_mm: w is [n, k], not of {right.ndim} axes")
        products.append(torch.matmul(left, right.t()).to(torch.float32))
    y = products[0] if len(products) == 1 else torch.cat(products, -1)
    return y if bias is None else y + bias.to(torch.float32)


def _row_chunks(w: Sequence[Tensor], w_format: str) -> Iterator[Sequence[Tensor]]:
    """Rows of ``w`` that share no scale, a few at a time: float64 has eight bytes a value."""
    shares = w_format not in PLAIN and parse(w_format).granularity.kind not in ("row", "block")
    counts = {part.shape[0] for part in w if part.ndim}
    count, width = (w[0].shape[0], w[0].shape[-1]) if w[0].ndim == 2 else (0, 1)
    step: Any = max(_CHUNK // width, 1) if is_int(width) and width else count
    if shares or len(counts) != 1 or not is_int(count) or count <= step:
        yield w
        return
    for start in range(0, count, step):
        yield [part[start : start + step] if part.ndim else part for part in w]


IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "scaleprop::quantize": quantize,
    "scaleprop::dequantize": dequantize,
    "scaleprop::fake_quantize": fake_quantize,
    "scaleprop::scaled_mm": scaled_mm,
    "scaleprop::hadamard": hadamard,
    "scaleprop::cast": products.cast,
    "scaleprop::gemm": products.gemm,
    "scaleprop::power_scale": products.power_scale,
    "scaleprop::quantize_operand": operands.quantize_operand,
    "scaleprop::eden_operand": operands.eden_operand,
    **{f"scaleprop::{name}": function for name, function in steps.KERNELS.items()},
}
