"""Launching the dequantize kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.backends.cuda.constants import stored_constants
from scaleprop.backends.cuda.kernels.dequantizing import dequantize_kernel
from scaleprop.backends.cuda.launching import Parts, as_bytes, launch, programs
from scaleprop.formats.scaled import ScaledFormat

ROWS, COLUMNS = 16, 128  # of a program


def dequantize(parts: Sequence[Tensor], fmt: ScaledFormat, k: int,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """x̂ [..., k] in ``dtype``: that of ``scaleprop.dequantize``, bit for bit.

    parts: of a tensor quantized along its last axis; tiles of two axes only.

    Raises:
        FormatError: for formats that no kernel reads.
    """
    stored, held = stored_constants(fmt), Parts.of(parts, fmt)
    m, width = held.data.shape
    out = torch.empty(m, k, dtype=dtype, device=held.data.device)
    columns = max(COLUMNS, stored.columns)
    launch(dequantize_kernel, (programs(m, ROWS), programs(k, columns)), *held[:2], held.zeros,
           held.outer, as_bytes(out), m, k, width, held.scales.shape[-1] if stored.columns else 1,
           k, F=stored, ROWS=ROWS, COLUMNS=columns)
    return out.reshape(*parts[0].shape[:-1], k)
