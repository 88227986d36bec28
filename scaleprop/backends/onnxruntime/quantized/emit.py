"""Short spellings for the ONNX nodes that quantization needs, over ``GraphBuilder``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from scaleprop.backends.onnxruntime.builder import MICROSOFT, GraphBuilder

FLOAT = int(ir.DataType.FLOAT)
INT8 = int(ir.DataType.INT8)
UINT8 = int(ir.DataType.UINT8)
INT32 = int(ir.DataType.INT32)
INT64 = int(ir.DataType.INT64)
ZERO = 128  # zero point of symmetric uint8 activations: onnxruntime's fast GEMM is u8 × s8

Operand = ir.Value | float


@dataclasses.dataclass(frozen=True)
class Emitter:
    """Calls append a node; Python floats among the inputs become float32 constants."""

    builder: GraphBuilder

    def __call__(self, op_type: str, *inputs: Operand | None, **attributes: Any) -> ir.Value:
        values = [x if x is None or isinstance(x, ir.Value) else self.f32(x) for x in inputs]
        return self.builder.op(op_type, *values, **attributes)

    def contrib(self, op_type: str, *inputs: Operand | None, **attributes: Any) -> ir.Value:
        """A node of onnxruntime's own domain."""
        return self(op_type, *inputs, domain=MICROSOFT, **attributes)

    def f32(self, value: Any) -> ir.Value:
        """A float32 constant."""
        return self.builder.constant(value, np.float32)

    def u8(self, value: Any) -> ir.Value:
        """A uint8 constant."""
        return self.builder.constant(value, np.uint8)

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.builder.constant(list(values), np.int64)

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        """A new axis of size one."""
        return self("Unsqueeze", x, self.ints(axis))

    def squeeze(self, x: ir.Value, axis: int) -> ir.Value:
        """Drop an axis of size one."""
        return self("Squeeze", x, self.ints(axis))

    def reduce(self, op_type: str, x: ir.Value, axes: Sequence[int] | None,
               keep: bool = False) -> ir.Value:
        """``ReduceMax`` and its like; ``axes`` None reduces all to a scalar."""
        where = None if axes is None else self.ints(*axes)
        return self(op_type, x, where, keepdims=int(keep))

    def split_last(self, x: ir.Value, rank: int, size: int, block: int) -> ir.Value:
        """[..., size] as [..., ⌈size/block⌉, block], zero-padded to whole blocks."""
        missing = -size % block
        if missing:
            x = self("Pad", x, self.ints(*[0] * (2 * rank - 1), missing))
        return self("Reshape", x, self.ints(*[0] * (rank - 1), -(-size // block), block))

    def join_last(self, x: ir.Value, rank: int, size: int, block: int,
                  as_row: bool = False) -> ir.Value:
        """The inverse of ``split_last``; ``as_row``: [..., 1, size]."""
        padded = size + -size % block
        x = self("Reshape", x, self.ints(*[0] * (rank - 1), *[1] * as_row, padded))
        if padded != size:
            x = self("Slice", x, self.ints(0), self.ints(size), self.ints(-1))
        return x

    def power_below(self, x: ir.Value) -> ir.Value:
        """2^⌊log2 |x|⌋ from the exponent bits; 0 for 0 and subnormals, Inf for Inf and NaN."""
        mask = self.builder.constant(0x7F800000, np.int32)
        return self("BitCast", self("BitwiseAnd", self.bits(x), mask), to=FLOAT)

    def bits(self, x: ir.Value) -> ir.Value:
        """The bits of float32 values as int32; what they were made from, where that is known."""
        source = x.producer()
        if source is not None and source.op_type == "BitCast" and source.inputs[0] is not None:
            return source.inputs[0]
        return self("BitCast", x, to=INT32)

    def quantize_u8(self, x: ir.Value, scale: Operand, zero: ir.Value | int) -> ir.Value:
        """uint8 codes clamp(RNE(x/scale) + zero, 0, 255)."""
        return self("QuantizeLinear", x, scale, self.u8(zero) if isinstance(zero, int) else zero)
