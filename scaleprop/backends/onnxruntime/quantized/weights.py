"""Constant quantized tensors: what is in the file, and how it expands when the session loads.

The file holds the format's own storage: packed codes and stored scales. The nodes appended here
have constant inputs only, so onnxruntime folds them once, at load, with default session options.
Weights are [N, K], quantized along K; matrix products want [K, N].

Limbs (T1). With a power of two c[n] per column, w[n, :]/c[n] = Σ_i limb_i·128^-i with int8 limbs:
exactly, where the column's block exponents lie close enough together. ``limbs_needed`` finds how
many limbs are exact; fewer leave an error below half a unit of the last limb.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from scaleprop.backends.onnxruntime.quantized import expand
from scaleprop.backends.onnxruntime.quantized.emit import FLOAT, INT32, Emitter
from scaleprop.backends.onnxruntime.quantized.expand import Array
from scaleprop.formats import ScaledTensor
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.packing import pack
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import is_packed

MAX_LIMBS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A constant quantized matrix [N, K] and its name in the file."""

    tensor: ScaledTensor
    name: str
    _made: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any], repr=False)

    @property
    def format(self) -> ScaledFormat:
        """Its scaled format."""
        return self.tensor.format

    @property
    def outputs(self) -> int:
        """N."""
        return self.tensor.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self.tensor.shape[1]

    @property
    def integer_columns(self) -> bool:
        """Whether ŵ[n, k] = (int8 - zero[n])·scale[n]: one integer product is exact."""
        element = self.format.element
        return isinstance(element, IntegerElement) and \
            self.format.granularity.kind in ("row", "tensor")

    @functools.cached_property
    def unscaled(self) -> Tensor:
        """ŵ without the tensor scale, [N, K] float32; kept while the node is lowered."""
        parts = self.tensor
        if parts.tensor_scale is None:
            return parts.dequantize(torch.float32)
        one = torch.ones_like(parts.tensor_scale)
        return dataclasses.replace(parts, tensor_scale=one).dequantize(torch.float32)

    @property
    def outer(self) -> float:
        """The tensor scale."""
        return 1.0 if self.tensor.tensor_scale is None else float(self.tensor.tensor_scale)

    @functools.cached_property
    def units(self) -> Tensor:
        """c[n], float32 [N]: the smallest power of two with max|w[n]|/c[n] ≤ 127."""
        largest = self.unscaled.abs().amax(1)
        fraction, exponent = torch.frexp(largest)
        shift = torch.where(fraction <= 127 / 128, 7, 6)
        unit = torch.ldexp(torch.ones_like(largest), (exponent - shift).clamp(-126, 120))
        return torch.where(largest > 0, unit, 1.0)

    @functools.cached_property
    def limbs_needed(self) -> int | None:
        """How many limbs hold every column exactly; None where ``MAX_LIMBS`` do not."""
        if self.integer_columns:
            return 1
        if self.format.scale.fraction_bits > 3:  # no power-of-two columns for such scales
            return None
        rest = self.unscaled / self.units[:, None]
        for count in range(1, MAX_LIMBS + 1):
            rest = rest - rest.round()
            if not rest.any():
                return count
            rest = rest * 128.0
        return None

    @property
    def power_columns(self) -> bool:
        """Whether columns of limbs are scaled by powers of two alone."""
        return self.outer == 1.0 and not self.integer_columns

    @property
    def fits_nbits(self) -> bool:
        """Whether ``MatMulNBits`` takes these codes and scales."""
        fmt = self.format
        return isinstance(fmt.element, IntegerElement) and fmt.element.unit == 1.0 \
            and fmt.bits in (2, 4) and fmt.granularity.kind == "block" \
            and fmt.granularity.columns in (16, 32, 64, 128, 256) and not fmt.two_level

    @functools.cached_property
    def column_sum(self) -> float:
        """max_n Σ_k |first limb|: bounds the integer accumulator."""
        return float((self.unscaled / self.units[:, None]).round().abs().sum(1).max())

    def release(self) -> None:
        """Drop the expanded copy that the decisions were made from."""
        self.__dict__.pop("unscaled", None)

    # ---- nodes --------------------------------------------------------------------------------

    def float_matrix(self, e: Emitter) -> ir.Value:
        """ŵ as float32 [K, N]."""
        return self._once("float", lambda: self._make_float_matrix(e))

    def _make_float_matrix(self, e: Emitter) -> ir.Value:
        rows = self._float_rows(e)
        if self.tensor.tensor_scale is not None:
            rows = e("Mul", rows, self.outer)
        return e("Transpose", rows, perm=[1, 0])

    def _once(self, key: Any, emit: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = emit()
        return self._made[key]

    def limb_matrix(self, e: Emitter, count: int) -> tuple[ir.Value, ir.Value]:
        """(int8 limbs side by side [K, count·N], their column scales [count·N])."""
        return self._once(count, lambda: self._make_limbs(e, count))

    def _make_limbs(self, e: Emitter, count: int) -> tuple[ir.Value, ir.Value]:
        if self.integer_columns and count == 1:
            matrix, steps = self._integer_matrix(e)
        else:
            matrix = self._looked_up_limbs(e, count) if self.has_limb_table else \
                self._computed_limbs(e, count)
            scales = self.units.double() * self.outer
            steps = torch.cat([scales * 128.0**-i for i in range(count)]).float()
        return matrix, e.builder.initializer(steps.numpy(), f"{self.name}_columns")

    def _computed_limbs(self, e: Emitter, count: int) -> ir.Value:
        """Limbs [K, count·N] by float arithmetic."""
        inverse = (1.0 / self.units).numpy()[:, None]
        if self.format.granularity.kind == "tile":
            rest = e("Mul", self._float_rows(e), e.f32(inverse))
        else:
            rest = self._float_rows(e, inverse)
        limbs: list[ir.Value] = []
        zero = e.builder.constant(0, np.int8)
        for index in range(count):
            scale = e.f32(128.0**-index)
            limbs.append(e("QuantizeLinear", rest, scale, zero))
            if index + 1 < count:  # a DequantizeLinear would not be folded
                value = e("Cast", limbs[-1], to=FLOAT)
                rest = e("Sub", rest, value if index == 0 else e("Mul", value, scale))
        joined = limbs[0] if count == 1 else e("Concat", *limbs, axis=0)
        return e("Transpose", joined, perm=[1, 0])

    @property
    def has_limb_table(self) -> bool:
        """Whether a table by code and block exponent gives limbs: few codes, scales 2^e."""
        fmt = self.format
        return not fmt.scale.has_zero and fmt.bits <= 6 and is_packed(fmt) \
            and fmt.granularity.kind == "block"

    def _looked_up_limbs(self, e: Emitter, count: int) -> ir.Value:
        """Limbs [K, count·N] from a table; blocks are told apart by exponents below the top."""
        assert self.format.block is not None
        ratio = self.tensor.scale.float() / self.units[:, None]
        top = float(ratio.max())
        vanishing = 7 * count + 8  # all limbs of a value this many exponents down are zero
        steps = int(np.clip(np.log2(top / float(ratio.min())), 0, vanishing))
        scale = expand.stored_scale(e, self.tensor.scale, self.format, self.name)
        relative = e("Mul", scale, e.f32((1.0 / (self.units * top)).numpy()[:, None]))
        relative = e("Max", relative, 2.0**-steps)
        octave = e.builder.constant(1 << 23, np.int32)
        bits = e("Div", e("BitCast", relative, to=INT32), octave)
        shift = e("Sub", e.builder.constant(127, np.int32), bits)
        rows = expand.by_block(e, self.tensor.data, self.name, self.format.bits,
                               expand.limb_table(self.format, top, steps, count), shift,
                               self.format.block[1], self.inputs)
        columns = e("Transpose", rows, perm=[1, 0])
        return columns if count == 1 else e(
            "Reshape", columns, e.ints(self.inputs, count * self.outputs))

    def zero_points(self, e: Emitter) -> ir.Value | None:
        """int8 zero point of each column of ``limb_matrix``, [N]; None where they are zero."""
        return self._once("zero", lambda: self._make_zero_points(e))

    def _make_zero_points(self, e: Emitter) -> ir.Value | None:
        zero = self.tensor.zero_point
        if zero is None:
            return None
        offset = 1 << (self.format.bits - 1)
        shifted = (zero.to(torch.int16) - offset).to(torch.int8).reshape(-1)
        return e.builder.initializer(shifted.expand(self.outputs).contiguous(),
                                     f"{self.name}_zero")

    def nbits(self, e: Emitter) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Codes, scales and zero points as ``MatMulNBits`` wants them.

        Its codes are unsigned, with 2^(bits-1) meaning zero: the sign bit of each code is flipped.
        """
        return self._once("nbits", lambda: self._make_nbits(e))

    def _make_nbits(self, e: Emitter) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        fmt, tensor = self.format, self.tensor
        blocks = tensor.scale.shape[-1]
        flip = 0 if fmt.zero_point else {4: 0x88, 2: 0xAA}[fmt.bits]
        data = (tensor.data ^ flip).reshape(self.outputs, blocks, -1)
        zeros = None
        if tensor.zero_point is not None:
            zeros = e.builder.initializer(pack(tensor.zero_point, fmt.bits), f"{self.name}_zero")
        return (e.builder.initializer(data, self.name),
                expand.stored_scale(e, tensor.scale, fmt, self.name), zeros)

    def _integer_matrix(self, e: Emitter) -> tuple[ir.Value, Tensor]:
        """Codes themselves as int8 [K, N] (minus 2^(bits-1) with a zero point), and scales [N]."""
        scale = self.tensor.scale.float().reshape(-1).expand(self.outputs)
        steps = scale * float(getattr(self.format.element, "unit", 1.0))
        if not is_packed(self.format):
            codes = self.tensor.codes()
            if self.tensor.zero_point is not None:
                codes = (codes ^ 0x80).view(torch.int8)
            return e.builder.initializer(codes.t(), self.name), steps.contiguous()
        offset = 1 << (self.format.bits - 1) if self.tensor.zero_point is not None else 0
        rows = self._looked_up(e, expand.integer_table(self.format, offset))
        return e("Transpose", rows, perm=[1, 0]), steps.contiguous()

    def _float_rows(self, e: Emitter, factors: Array | None = None) -> ir.Value:
        """ŵ without the tensor scale as float32 [N, K], rows multiplied by powers of two."""
        values = expand.element_values(e, self.tensor.data, self.format, self.name,
                                       [self.outputs], self._padded)
        return expand.scaled_values(e, self.tensor, values, self.name, self.inputs, self._padded,
                                    factors)

    @property
    def _padded(self) -> int:
        block = self.format.block
        return self.inputs if block is None else self.inputs + -self.inputs % block[1]

    def _looked_up(self, e: Emitter, table: Array) -> ir.Value:
        data = e.builder.initializer(self.tensor.data, self.name)
        return expand.unpacked(e, data, self.format.bits, table, [self.outputs], self.inputs)
