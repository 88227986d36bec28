"""The operators ``scaleprop::*``. Importing this module registers them with torch.

``quantize``, ``dequantize``, ``fake_quantize``, ``scaled_mm``, ``hadamard`` are the overloads that
graphs hold (``torch.ops.scaleprop.<name>.default``); passes insert them, backends lower them.
``cast``, ``gemm``, ``wide_mm`` and ``power_scale`` are those of training graphs; ``wide_mm`` alone
has no implementation in ATen, and stays whole.
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
wide_mm = torch.ops.scaleprop.wide_mm.default
power_scale = torch.ops.scaleprop.power_scale.default
quantize_operand = torch.ops.scaleprop.quantize_operand.default
eden_operand = torch.ops.scaleprop.eden_operand.default
random_bits = torch.ops.scaleprop.random_bits.default
random_signs = torch.ops.scaleprop.random_signs.default
fixed_signs = torch.ops.scaleprop.fixed_signs.default
rotate = torch.ops.scaleprop.rotate.default
unrotate = torch.ops.scaleprop.unrotate.default
softened = torch.ops.scaleprop.softened.default
estimate = torch.ops.scaleprop.estimate.default
truncate = torch.ops.scaleprop.truncate.default

__all__ = [
    "IMPLEMENTATIONS",
    "cast",
    "dequantize",
    "eden_operand",
    "estimate",
    "fake_quantize",
    "fixed_signs",
    "gemm",
    "hadamard",
    "power_scale",
    "quantize",
    "quantize_operand",
    "random_bits",
    "random_signs",
    "rotate",
    "scaled_mm",
    "softened",
    "truncate",
    "unrotate",
    "wide_mm",
]
