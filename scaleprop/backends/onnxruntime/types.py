"""Element types: torch, ONNX, and the type in which onnxruntime's CPU kernels compute.

onnxruntime's CPU provider has no bfloat16 arithmetic and runs float16 by casting around every
operator. Inside the graph such tensors are therefore *held* in float32: weights keep their type in
the file and are widened once when the session loads, explicit casts still round, and graph inputs
and outputs keep the captured type. Results are at least as precise as the captured model's.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

_TO_ONNX: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.float8_e8m0fnu: ir.DataType.FLOAT8E8M0,
    torch.uint8: ir.DataType.UINT8,
    torch.uint16: ir.DataType.UINT16,
    torch.uint32: ir.DataType.UINT32,
    torch.uint64: ir.DataType.UINT64,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
    torch.complex64: ir.DataType.COMPLEX64,
}

# dtypes that numpy lacks, and the numpy type (ml_dtypes) with the same bits
NUMPY_EXTRA: dict[torch.dtype, np.dtype] = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    torch.float8_e8m0fnu: np.dtype(ml_dtypes.float8_e8m0fnu),
}


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of ``dtype``.

    Raises:
        TypeError: where ONNX has none (complex128, quantized torch types).
    """
    try:
        return _TO_ONNX[dtype]
    except KeyError:
        raise TypeError(f"{dtype} has no ONNX element type") from None


def held(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` lives inside the ONNX graph."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
