"""The operators ``scaleprop::*``. Importing this module registers them with torch.

``quantize``, ``dequantize``, ``fake_quantize``, ``scaled_mm``, ``hadamard`` are the overloads that
graphs hold (``torch.ops.scaleprop.<name>.default``); passes insert them, backends lower them.
``cast``, ``gemm`` and ``power_scale`` are those of training graphs.
"""

import torch

from scaleprop.ops.implementations import IMPLEMENTATIONS
from scaleprop.ops.registration import register

register()

quantize = torch.ops.scaleprop.quantize.default
dequantize = torch.ops.scaleprop.dequantize.default
fake_quantize = torch.ops.scaleprop.fake_quantize.default
scaled_mm = torch.ops.scaleprop.scaled_mm.default
hadamard = torch.ops.scaleprop.hadamard.default
cast = torch.ops.scaleprop.cast.default
gemm = torch.ops.scaleprop.gemm.default
power_scale = torch.ops.scaleprop.power_scale.default
quantize_operand = torch.ops.scaleprop.quantize_operand.default
eden_operand = torch.ops.scaleprop.eden_operand.default

__all__ = [
    "IMPLEMENTATIONS",
    "cast",
    "dequantize",
    "eden_operand",
    "fake_quantize",
    "gemm",
    "hadamard",
    "power_scale",
    "quantize",
    "quantize_operand",
    "scaled_mm",
]
