"""The operators that passes insert."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop import ops

__all__ = ["DEQUANTIZE", "FAKE_QUANTIZE", "QUANTIZE", "SCALED_MM"]

QUANTIZE: Any = torch.ops.scaleprop.quantize.default
DEQUANTIZE: Any = torch.ops.scaleprop.dequantize.default
FAKE_QUANTIZE: Any = torch.ops.scaleprop.fake_quantize.default
SCALED_MM: Any = torch.ops.scaleprop.scaled_mm.default

del ops  # imported because it registers them
