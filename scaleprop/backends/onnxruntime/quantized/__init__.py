"""Quantized operators on stock onnxruntime: which kernel, in which form, within which error.

``lowering`` registers the operators, ``products`` holds the candidates for a matrix product,
``cost`` ranks them, ``operand`` and ``weights`` are the two sides, ``support`` tells it in a table.
"""

from scaleprop.backends.onnxruntime.quantized.lowering import (
    lower_dequantize,
    lower_fake_quantize,
    lower_hadamard,
    lower_quantize,
    lower_scaled_mm,
)
from scaleprop.backends.onnxruntime.quantized.support import Support, support

__all__ = [
    "Support",
    "lower_dequantize",
    "lower_fake_quantize",
    "lower_hadamard",
    "lower_quantize",
    "lower_scaled_mm",
    "support",
]
