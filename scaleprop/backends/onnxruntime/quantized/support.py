"""What runs how: operator × format, derived by asking the lowerings themselves.

Statuses: ``native``: an onnxruntime kernel of that very meaning. ``exact``: emulated, with float32
accuracy or better. ``bounded``: emulated within a stated error. ``unsupported``: with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.backends.onnxruntime.quantized import expand, products, rounding, scales
from scaleprop.backends.onnxruntime.quantized.emit import Emitter
from scaleprop.backends.onnxruntime.quantized.operand import Quantized
from scaleprop.backends.onnxruntime.quantized.products import Problem
from scaleprop.backends.onnxruntime.quantized.weights import Weight
from scaleprop.formats import named_formats, parse, quantize
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.scaled import ScaledFormat

Status = Literal["native", "exact", "bounded", "unsupported"]

SIZE = 1024  # rows and columns of the weight that products are chosen for
ROWS = 128
MORE = ("int8[row]*f32", "int8[tensor]*f32+zp", "int8[1x128]*f32", "int4[1x32]*f16",
        "int4[row]*f32", "e4m3[row]*f32", "mxfp4:rceil", "mxfp8:rceil", "nvfp4:fouroversix")


@dataclasses.dataclass(frozen=True)
class Support:
    """One cell: how ``operator`` runs in ``format``; for products x_format × format of the weight.

    how: what runs, or why nothing does. error: stated bound relative to the largest output.
    """

    operator: str
    format: str
    status: Status
    how: str
    x_format: str | None = None
    error: float | None = None


def support(names: Sequence[str] | None = None) -> tuple[Support, ...]:
    """The table for these formats (default: all named ones and common variants)."""
    formats = [parse(name) for name in names or (*named_formats(), *MORE)]
    rows: list[Support] = []
    for fmt in formats:
        activation = _activation(fmt)
        rows += [activation, _constant(fmt), _product(fmt, None)]
        if activation.status != "unsupported":
            rows.append(_product(fmt, fmt))
    return tuple(rows)


def _activation(fmt: ScaledFormat) -> Support:
    why = rounding.why_not(fmt.element) or scales.why_not(fmt, 0)
    if why is not None:
        return Support("fake_quantize", str(fmt), "unsupported", why)
    whole = fmt.granularity.kind == "tensor" and isinstance(fmt.element, IntegerElement)
    if whole and fmt.bits == 8:
        return Support("fake_quantize", str(fmt), "native", "QuantizeLinear, DequantizeLinear")
    return Support("fake_quantize", str(fmt), "exact", "float32 arithmetic, nearest-even")


def _constant(fmt: ScaledFormat) -> Support:
    why = expand.why_not(fmt)
    if why is not None:
        return Support("dequantize", str(fmt), "unsupported", why)
    return Support("dequantize", str(fmt), "exact", "stored packed, expanded at load")


def _product(fmt: ScaledFormat, x_format: ScaledFormat | None) -> Support:
    left = "f32" if x_format is None else str(x_format)
    why = expand.why_not(fmt)
    if why is not None:
        return Support("scaled_mm", str(fmt), "unsupported", why, left)
    generator = torch.Generator().manual_seed(0)
    tensor = quantize(torch.randn(SIZE, SIZE, generator=generator), fmt)
    emitter = Emitter(GraphBuilder("probe", 26))
    operand = Quantized(emitter, ir.Value(name="x"), x_format, 2, SIZE)
    problem = Problem(operand, Weight(tensor, "w"), ROWS, None)
    chosen = products.choose(problem)
    error = chosen.error(problem)
    integer = isinstance(chosen, products.ByteProduct)
    status: Status = "native" if integer else (
        "exact" if error <= products.FLOAT_SUM else "bounded")
    return Support("scaled_mm", str(fmt), status, chosen.name, left, error)
