"""``scaleprop_cuda::*``: kernels as operators that graphs call and compilers leave alone.

They compute what ``scaleprop::*`` computes, on devices, and under Triton's interpreter anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.backends.cuda import (
    dequantizing,
    fusing,
    library,
    lines,
    products,
    quantizing,
    scaled,
    words,
)
from scaleprop.backends.cuda.constants import scaling_constants, stored_constants
from scaleprop.backends.cuda.devices import FLOAT8, capability_of
from scaleprop.backends.cuda.launching import matrix_of
from scaleprop.errors import FormatError
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN, ScaledFormat, parse
from scaleprop.ops import registration

NAMESPACE = "scaleprop_cuda"
SCHEMAS: Mapping[str, str] = {
    "quantize": "(Tensor x, str format, int axis=-1, str rounding='nearest', Tensor? bits=None, "
                "Tensor[]? scales=None) -> Tensor[]",
    "quantize_operand": "(Tensor x, str format, int[] axes, str rounding='nearest', "
                        "float prescale=1.0, Tensor? tensor_amax=None, Tensor? step=None, "
                        "Tensor[]? streams=None, int seed=0, int first_row=0, int rotation=0, "
                        "Tensor? signs=None) -> Tensor[]",
    "quantize_norm": "(Tensor x, Tensor? gain, Tensor? bias, str format, str kind, float eps, "
                     "ScalarType between) -> Tensor[]",
    "quantize_gated": "(Tensor gate, Tensor up, str format, str activation, ScalarType between) "
                      "-> Tensor[]",
    "quantize_activated": "(Tensor x, str format, str activation, ScalarType between) -> Tensor[]",
    "quantize_rotated": "(Tensor x, Tensor? signs, str format, int block) -> Tensor[]",
    "dequantize": "(Tensor[] parts, str format, SymInt[] shape, ScalarType dtype) -> Tensor",
    "multiply": "(Tensor[] x, Tensor[] w, Tensor? bias, Tensor? sums, str x_format, str w_format, "
                "int k, ScalarType dtype, bool plain=False) -> Tensor",
    "gemm": "(Tensor[] a, Tensor[] b, str a_format, str b_format, SymInt k, ScalarType dtype, "
            "bool whole=False) -> Tensor",
}  # fmt: skip


def quantize(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
             bits: Tensor | None = None, scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``scaleprop::quantize``; ``quantizes`` says of what."""
    fmt, mode = parse(format), parse_rounding(rounding)
    moved = x.movedim(axis, -1)
    if fmt.block is None and x.ndim == 2 and scales is None and not fmt.zero_point:
        (found,) = lines.quantize_lines(x, fmt, (axis % 2,))
    elif fmt.block is None:
        found = quantizing.quantize_rows(matrix_of(moved), fmt, scales)
    else:
        drawn = None if bits is None else matrix_of(bits.movedim(axis, -1))
        (found,) = quantizing.quantize_groups(matrix_of(moved), fmt, (1,), mode, drawn)
    return _shaped(found, moved, fmt)


def _shaped(parts: Sequence[Tensor], x: Tensor, fmt: ScaledFormat) -> list[Tensor]:
    """Parts of a matrix as those of x [..., K]."""
    return [part.reshape(*x.shape[:-1], part.shape[-1]) if part.ndim and fmt.granularity.rows == 1
            else part for part in parts]


def quantizes(fmt: ScaledFormat, ndim: int, stochastic: bool, given: bool) -> bool:
    """Whether ``quantize`` takes tensors of so many axes. given: scales are."""
    try:
        stored_constants(fmt)
        scaling_constants(fmt)
    except FormatError:
        return False
    if fmt.block is None:
        return not stochastic and fmt.scale.name == "f32" and not fmt.two_level
    rows, columns = fmt.block
    return (not given and not fmt.zero_point and rows & (rows - 1) == 0 and rows <= 256
            and columns & (columns - 1) == 0 and columns <= 256 and (rows == 1 or ndim == 2)
            and fmt.scale.name not in ("bf16", "f16"))


def quantize_operand(
    x: Tensor, format: str, axes: Sequence[int], rounding: str = "nearest", prescale: float = 1.0,
    tensor_amax: Tensor | None = None, step: Tensor | None = None,
    streams: Sequence[Tensor] | None = None, seed: int = 0, first_row: int = 0, rotation: int = 0,
    signs: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """``scaleprop::quantize_operand`` as stored parts, of each of ``axes`` (1: rows, 0: columns) in
    turn; x [M, K] is read once for both where registers hold its tiles, and once more before for
    the amax of rows and tensors.

    streams: of the random numbers, one an axis; step, seed, first_row: see ``quantizing.Draw``.
    rotation, signs: see ``quantizing.Rotation``; 0: none. tensor_amax: of one scale for all.
    """
    fmt, mode = parse(format), parse_rounding(rounding)
    if fmt.block is None:
        found = lines.quantize_lines(x, fmt, axes, tensor_amax)
    else:
        draw = None
        if step is not None and streams is not None:
            along, across = (dict(zip(axes, streams, strict=True)).get(axis, streams[0])
                             for axis in (1, 0))
            draw = quantizing.Draw(seed, step, along, across, first_row)
        turn = quantizing.Rotation(rotation, signs) if rotation else None
        found = quantizing.quantize_groups(x, fmt, axes, mode, draw, turn, prescale)
    return [part for parts in found for part in parts]


def quantize_norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, format: str,
                  kind: Any, eps: float, between: torch.dtype) -> list[Tensor]:
    """``scaleprop::quantize`` of a norm over the last axis, which is rounded to ``between``."""
    fmt = parse(format)
    return _shaped(fusing.norm_quantize(matrix_of(x), fmt, kind, gain, bias, eps, between), x, fmt)


def quantize_gated(gate: Tensor, up: Tensor, format: str, activation: str,
                   between: torch.dtype) -> list[Tensor]:
    """``scaleprop::quantize`` of f(gate)·up, each rounded to ``between``."""
    fmt = parse(format)
    found = fusing.gated_quantize(matrix_of(gate), matrix_of(up), fmt, activation, between)
    return _shaped(found, gate, fmt)


def quantize_activated(x: Tensor, format: str, activation: str,
                       between: torch.dtype) -> list[Tensor]:
    """``scaleprop::quantize`` of f(x), rounded to ``between``."""
    fmt = parse(format)
    return _shaped(fusing.activation_quantize(matrix_of(x), fmt, activation, between), x, fmt)


def quantize_rotated(x: Tensor, signs: Tensor | None, format: str, block: int) -> list[Tensor]:
    """``scaleprop::quantize`` of ``scaleprop::hadamard`` of float32, along the last axis."""
    fmt, rotation = parse(format), quantizing.Rotation(block, signs)
    (found,) = quantizing.quantize_groups(matrix_of(x), fmt, rotation=rotation)
    return _shaped(found, x, fmt)


def fuses(fmt: ScaledFormat) -> bool:
    """Whether norms and activations are quantized in this format where they are computed."""
    return quantizes(fmt, 1, False, False) and fusing.takes(fmt)


def rotates(fmt: ScaledFormat, block: int) -> bool:
    """Whether ``quantize_rotated`` takes these."""
    return (fmt.block is not None and fmt.block[0] == 1 and quantizes(fmt, 1, False, False)
            and block & (block - 1) == 0 and 2 <= block <= quantizing.MOST_ROTATED)


def dequantize(parts: Sequence[Tensor], format: str, shape: Sequence[Any],
               dtype: torch.dtype = torch.float32) -> Tensor:
    """``scaleprop::dequantize`` along the last axis."""
    return dequantizing.dequantize(parts, parse(format), shape[-1], dtype)


def multiply(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, sums: Tensor | None,
             x_format: str, w_format: str, k: int, dtype: torch.dtype,
             plain: bool = False) -> Tensor:
    """``scaleprop::scaled_mm`` in ``dtype``; a float x is multiplied in its own. plain: of weights,
    see ``words.is_plain``."""
    left = None if x_format in PLAIN else parse(x_format)
    if plain and words.multiplies(x[0], w):
        return words.multiply(x[0], w, bias, parse(w_format), k, dtype)
    return _product(x, w, bias, sums, (left, parse(w_format)), k, dtype)


def _product(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, sums: Tensor | None,
             formats: tuple[ScaledFormat | None, ScaledFormat], k: int,
             dtype: torch.dtype) -> Tensor:
    """The library's where the device has one, else a kernel's: of blocks as they are stored, or of
    decoded operands, in float8, where there are units for that."""
    capability = capability_of(w[0].device)
    left, right = formats
    if left is not None:
        kind = library.kind_of(left, right, w[0].shape[0], k, capability)
        if kind is not None and library.takes_rows(kind, math.prod(x[0].shape[:-1]), left):
            return library.multiply(kind, x, w, left, right, bias, dtype)
        if scaled.takes(left, right, capability):
            return scaled.multiply(x, w, bias, left, right, k, dtype)
    return products.multiply(x, w, bias, *formats, k, dtype, sums, fp8=capability >= FLOAT8)


def gemm(a: Sequence[Tensor], b: Sequence[Tensor], a_format: str, b_format: str, k: int,
         dtype: torch.dtype, whole: bool = False) -> Tensor:
    """Σ_k of stored [m, k] and [n, k] in ``dtype``. whole: with the scales of whole tensors."""
    formats = parse(a_format), parse(b_format)
    left, right = (parts if whole else _unscaled(parts, fmt)
                   for parts, fmt in zip((a, b), formats, strict=True))
    return _product(left, right, None, None, formats, k, dtype)


def _unscaled(parts: Sequence[Tensor], fmt: ScaledFormat) -> list[Tensor]:
    """With 1 for the scale of the whole tensor."""
    place = 1 if fmt.granularity.kind == "tensor" else 2 if fmt.two_level else None
    return [torch.ones_like(part) if index == place else part
            for index, part in enumerate(parts)]


def multiplies(x: ScaledFormat | torch.dtype, w: ScaledFormat, k: int) -> bool:
    """Whether ``multiply`` takes these."""
    try:
        products.way_of(x, w, k)
    except FormatError:
        return False
    return True


def _operand_fake(x: Tensor, format: str, axes: Sequence[int], rounding: str = "nearest",
                  *args: Any, **kwargs: Any) -> list[Tensor]:
    del rounding, args, kwargs
    return [part for axis in axes for part in registration.quantize_fake(x, format, axis)]


def _quantized_fake(x: Tensor, *args: Any) -> list[Tensor]:
    """Of the fused forms: the format is the first name among the arguments."""
    name = next(argument for argument in args if isinstance(argument, str))
    return registration.quantize_fake(x, name)


def _dequantize_fake(parts: Sequence[Tensor], format: str, shape: Sequence[Any],
                     dtype: torch.dtype) -> Tensor:
    return registration.dequantize_fake(parts, format, shape, -1, dtype)


def _multiply_fake(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None,
                   sums: Tensor | None, x_format: str, w_format: str, k: int,
                   dtype: torch.dtype, plain: bool = False) -> Tensor:
    del sums, plain
    return registration.scaled_mm_fake(x, w, bias, x_format, w_format, k).to(dtype)


def _gemm_fake(a: Sequence[Tensor], b: Sequence[Tensor], a_format: str, b_format: str, k: Any,
               dtype: torch.dtype, whole: bool = False) -> Tensor:
    del a_format, b_format, k, whole
    return a[0].new_empty((a[0].shape[0], b[0].shape[0]), dtype=dtype)


_KERNELS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize": (quantize, registration.quantize_fake),
    "quantize_operand": (quantize_operand, _operand_fake),
    **{kernel.__name__: (kernel, _quantized_fake) for kernel in (
        quantize_norm, quantize_gated, quantize_activated, quantize_rotated)},
    "dequantize": (dequantize, _dequantize_fake),
    "multiply": (multiply, _multiply_fake),
    "gemm": (gemm, _gemm_fake),
}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        kernel, fake = _KERNELS[name]
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd")(kernel)
        torch.library.register_fake(qualified)(fake)


_register()
