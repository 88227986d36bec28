"""Registers ``scaleprop::*`` with torch: schemas, kernels, fake kernels, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.quantize import check_bits_range, check_input
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN, parse
from scaleprop.formats.tensor import moved_shape, storage_layout
from scaleprop.ops import implementations, operands, products, steps
from scaleprop.ops.hadamard import check_hadamard, hadamard

SCHEMAS = {
    "quantize": "(Tensor x, str format, int axis=-1, str rounding='nearest', Tensor? bits=None, "
                "Tensor[]? scales=None) -> Tensor[]",
    "dequantize": "(Tensor[] parts, str format, SymInt[] shape, int axis=-1, "
                  "ScalarType dtype=float32) -> Tensor",
    "fake_quantize": "(Tensor x, str format, int axis=-1, str rounding='nearest', "
                     "Tensor? bits=None, Tensor[]? scales=None) -> Tensor",
    "scaled_mm": "(Tensor[] x, Tensor[] w, Tensor? bias, str x_format, str w_format, SymInt k) "
                 "-> Tensor",
    "hadamard": "(Tensor x, int block, Tensor? signs=None, int axis=-1, bool transpose=False) "
                "-> Tensor",
    "cast": "(Tensor x, str element) -> Tensor",
    "gemm": "(Tensor a, Tensor b, float alpha, ScalarType dtype) -> Tensor",
    "wide_mm": "(Tensor a, Tensor b) -> Tensor",
    "power_scale": "(Tensor x, str element, int margin) -> Tensor",
    "quantize_operand": "(Tensor x, str format, int axis, str rounding='nearest', "
                        "Tensor? bits=None, Tensor? tensor_amax=None, float prescale=1.0, "
                        "float headroom=1.0, ScalarType dtype=bfloat16) -> (Tensor, Tensor)",
    "eden_operand": "(Tensor x, str format, int axis, Tensor bits, int group=128, "
                    "ScalarType dtype=bfloat16, str rounding='stochastic:16', "
                    f"float headroom={operands.EDEN_HEADROOM}) -> (Tensor, Tensor)",
}


def quantize_kernel(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                    bits: Tensor | None = None,
                    scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``implementations.quantize``, after reading whether the random bits are in range."""
    check_input(x, axis, parse_rounding(rounding), bits)
    check_bits_range(parse_rounding(rounding), bits)
    return implementations.quantize(x, format, axis, rounding, bits, scales)


def fake_quantize_kernel(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                         bits: Tensor | None = None,
                         scales: Sequence[Tensor] | None = None) -> Tensor:
    """``implementations.fake_quantize``, contiguous and never an alias of ``x``."""
    check_input(x, axis, parse_rounding(rounding), bits)
    check_bits_range(parse_rounding(rounding), bits)
    y = implementations.fake_quantize(x, format, axis, rounding, bits, scales)
    return y.contiguous()


def dequantize_kernel(parts: Sequence[Tensor], format: str, shape: Sequence[Any], axis: int = -1,
                      dtype: torch.dtype = torch.float32) -> Tensor:
    """``implementations.dequantize``, contiguous."""
    return implementations.dequantize(parts, format, shape, axis, dtype).contiguous()


def hadamard_kernel(x: Tensor, block: int, signs: Tensor | None = None, axis: int = -1,
                    transpose: bool = False) -> Tensor:
    """``hadamard.hadamard``, contiguous."""
    return hadamard(x, block, signs, axis, transpose).contiguous()


def quantize_fake(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                  bits: Tensor | None = None,
                  scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Shapes and dtypes of the parts."""
    check_input(x, axis, parse_rounding(rounding), bits)
    layout = storage_layout(parse(format), x.shape, axis)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in layout]


def fake_quantize_fake(x: Tensor, format: str, axis: int = -1, rounding: str = "nearest",
                       bits: Tensor | None = None,
                       scales: Sequence[Tensor] | None = None) -> Tensor:
    """As ``x``, contiguous."""
    check_input(x, axis, parse_rounding(rounding), bits)
    storage_layout(parse(format), x.shape, axis)
    return x.new_empty(x.shape)


def dequantize_fake(parts: Sequence[Tensor], format: str, shape: Sequence[Any], axis: int = -1,
                    dtype: torch.dtype = torch.float32) -> Tensor:
    """The logical shape, in ``dtype``."""
    fmt = parse(format)
    implementations.check_parts(parts, fmt)
    moved_shape(shape, axis)
    return parts[0].new_empty(list(shape), dtype=dtype)


def scaled_mm_fake(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, x_format: str,
                   w_format: str, k: Any) -> Tensor:
    """[..., n] float32."""
    for parts, name in ((x, x_format), (w, w_format)):
        if name not in PLAIN:
            implementations.check_parts(parts, parse(name))
    return x[0].new_empty((*x[0].shape[:-1], w[0].shape[0]), dtype=torch.float32)


def hadamard_fake(x: Tensor, block: int, signs: Tensor | None = None, axis: int = -1,
                  transpose: bool = False) -> Tensor:
    """As ``x``, contiguous."""
    check_hadamard(x, block, signs, axis)
    return x.new_empty(x.shape)


def cast_fake(x: Tensor, element: str) -> Tensor:
    """As ``x``, in the element's dtype."""
    return torch.empty_like(x, dtype=products.float_element(element).storage)


def gemm_fake(a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """[m, n]."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def wide_mm_fake(a: Tensor, b: Tensor) -> Tensor:
    """[m, n] of float32."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def power_scale_fake(x: Tensor, element: str, margin: int) -> Tensor:
    """A scalar."""
    return x.new_empty((), dtype=torch.float32)


def quantize_operand_kernel(x: Tensor, format: str, axis: int, rounding: str = "nearest",
                            bits: Tensor | None = None, tensor_amax: Tensor | None = None,
                            prescale: float = 1.0, headroom: float = 1.0,
                            dtype: torch.dtype = torch.bfloat16) -> operands.Pair:
    """``operands.quantize_operand``, contiguous, after reading whether bits are in range."""
    check_bits_range(parse_rounding(rounding), bits)
    values, outer = operands.quantize_operand(x, format, axis, rounding, bits, tensor_amax,
                                              prescale, headroom, dtype)
    return values.contiguous(), outer


def quantize_operand_fake(x: Tensor, format: str, axis: int, rounding: str = "nearest",
                          bits: Tensor | None = None, tensor_amax: Tensor | None = None,
                          prescale: float = 1.0, headroom: float = 1.0,
                          dtype: torch.dtype = torch.bfloat16) -> operands.Pair:
    """As ``x``, contiguous, in ``dtype``; and a scalar."""
    fmt = parse(format)
    operands.check_operand(x, fmt, axis, parse_rounding(rounding), bits, tensor_amax, dtype)
    storage_layout(fmt, x.shape, axis)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)


def eden_operand_kernel(x: Tensor, format: str, axis: int, bits: Tensor, group: int = 128,
                        dtype: torch.dtype = torch.bfloat16, rounding: str = "stochastic:16",
                        headroom: float = operands.EDEN_HEADROOM) -> operands.Pair:
    """``operands.eden_operand``, contiguous, after reading whether bits are in range."""
    check_bits_range(parse_rounding(rounding), bits)
    values, outer = operands.eden_operand(x, format, axis, bits, group, dtype, rounding, headroom)
    return values.contiguous(), outer


def eden_operand_fake(x: Tensor, format: str, axis: int, bits: Tensor, group: int = 128,
                      dtype: torch.dtype = torch.bfloat16, rounding: str = "stochastic:16",
                      headroom: float = operands.EDEN_HEADROOM) -> operands.Pair:
    """As ``x``, contiguous, in ``dtype``; and a scalar."""
    operands.check_eden(x, parse(format), axis, parse_rounding(rounding), bits, group, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)


def _as_called(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """One gradient per argument that the call spelled out: torch drops those left at defaults."""
    return grads[: len(ctx.needs_input_grad)]


def _quantize_setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    """Codes have no gradient: what comes out does not require one."""
    ctx.mark_non_differentiable(*output)
    ctx.scales = inputs[5]


def _quantize_backward(ctx: Any, *grads: Any) -> Any:
    none = None if ctx.scales is None else [None] * len(ctx.scales)
    return _as_called(ctx, None, None, None, None, None, none)


def _fake_quantize_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.scales = inputs[5]


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> Any:
    """Straight through."""
    none = None if ctx.scales is None else [None] * len(ctx.scales)
    return _as_called(ctx, grad, None, None, None, None, none)


def _dequantize_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.count = len(inputs[0])


def _dequantize_backward(ctx: Any, grad: Tensor) -> Any:
    return _as_called(ctx, [None] * ctx.count, None, None, None, None)


def _scaled_mm_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, w, bias, ctx.x_format, ctx.w_format, ctx.k = inputs
    ctx.counts = (len(x), len(w))
    ctx.dtypes = (x[0].dtype, w[0].dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(*x, *w)


def _scaled_mm_backward(ctx: Any, grad: Tensor) -> Any:
    """dx = dy·ŵ and dw = dyᵀ·x̂ for plain operands, dbias = Σ dy; summed in float64."""
    count = ctx.counts[0]
    x, w = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    wide = grad.to(torch.float64)
    grad_x: list[Tensor | None] = [None] * ctx.counts[0]
    grad_w: list[Tensor | None] = [None] * ctx.counts[1]
    if ctx.x_format in PLAIN and ctx.needs_input_grad[0][0]:
        right = implementations.operand(w, ctx.w_format, ctx.k, torch.float64)
        grad_x[0] = torch.matmul(wide, right).to(ctx.dtypes[0])
    if ctx.w_format in PLAIN and ctx.needs_input_grad[1][0]:
        left = implementations.operand(x, ctx.x_format, ctx.k, torch.float64)
        rows = wide.reshape(-1, wide.shape[-1])
        grad_w[0] = torch.matmul(rows.t(), left.reshape(-1, left.shape[-1])).to(ctx.dtypes[1])
    grad_bias = None
    if ctx.dtypes[2] is not None and ctx.needs_input_grad[2]:
        grad_bias = wide.reshape(-1, wide.shape[-1]).sum(0).to(ctx.dtypes[2])
    return _as_called(ctx, grad_x, grad_w, grad_bias, None, None, None)


def _hadamard_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, ctx.block, signs, ctx.axis, ctx.transpose = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx: Any, grad: Tensor) -> Any:
    """The transpose, which is the inverse."""
    (signs,) = ctx.saved_tensors
    result = torch.ops.scaleprop.hadamard(grad, ctx.block, signs, ctx.axis, not ctx.transpose)
    return _as_called(ctx, result, None, None, None, None)


_KERNELS = {"quantize": quantize_kernel, "dequantize": dequantize_kernel,
            "fake_quantize": fake_quantize_kernel, "scaled_mm": implementations.scaled_mm,
            "hadamard": hadamard_kernel, "cast": products.cast, "gemm": products.gemm,
            "wide_mm": products.wide_mm, "power_scale": products.power_scale,
            "quantize_operand": quantize_operand_kernel, "eden_operand": eden_operand_kernel}
_FAKES = {"quantize": quantize_fake, "dequantize": dequantize_fake,
          "fake_quantize": fake_quantize_fake, "scaled_mm": scaled_mm_fake,
          "hadamard": hadamard_fake, "cast": cast_fake, "gemm": gemm_fake,
          "wide_mm": wide_mm_fake, "power_scale": power_scale_fake,
          "quantize_operand": quantize_operand_fake,
          "eden_operand": eden_operand_fake}
_GRADIENTS = {"quantize": (_quantize_setup, _quantize_backward),
              "dequantize": (_dequantize_setup, _dequantize_backward),
              "fake_quantize": (_fake_quantize_setup, _fake_quantize_backward),
              "scaled_mm": (_scaled_mm_setup, _scaled_mm_backward),
              "hadamard": (_hadamard_setup, _hadamard_backward)}


def register() -> None:
    """Define every operator; called once, by ``import scaleprop.ops``.

    Raises:
        FormatError: where an operator of this name exists already.
    """
    kernels, fakes = _KERNELS | steps.KERNELS, _FAKES | steps.KERNELS
    for name, schema in (SCHEMAS | steps.SCHEMAS).items():
        qualified = f"scaleprop::{name}"
        if hasattr(torch.ops.scaleprop, name):
            raise FormatError(f"operator {qualified} is registered already")
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd")(kernels[name])
        torch.library.register_fake(qualified)(fakes[name])
        if name in _GRADIENTS:
            setup, backward = _GRADIENTS[name]
            torch.library.register_autograd(qualified, backward, setup_context=setup)
