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
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from scaleprop.backends.onnxruntime.quantized.emit import FLOAT, INT8, INT32, Emitter
from scaleprop.formats import ScaledTensor
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.packing import pack
from scaleprop.formats.rounding import decode
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
        return self._once("float", lambda: e(
            "Transpose", self._float_rows(e, with_outer=True), perm=[1, 0]))

    def _once(self, key: Any, emit: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = emit()
        return self._made[key]

    def limb_matrix(self, e: Emitter, count: int) -> tuple[ir.Value, ir.Value]:
        """(int8 limbs side by side [K, count·N], their column scales [count·N])."""
        return self._once(count, lambda: self._make_limbs(e, count))

    def _make_limbs(self, e: Emitter, count: int) -> tuple[ir.Value, ir.Value]:
        scales = self.units.double() * self.outer
        steps = torch.cat([scales * 128.0**-i for i in range(count)]).float()
        if self.integer_columns and count == 1:
            matrix, steps = self._integer_matrix(e)
        else:
            rest = e("Mul", self._float_rows(e, with_outer=False), e.f32(self._inverse_units()))
            limbs: list[ir.Value] = []
            for index in range(count):
                limb = e("Round", rest)
                limbs.append(e("Cast", limb, to=INT8))
                if index + 1 < count:
                    rest = e("Mul", e("Sub", rest, limb), 128.0)
            joined = limbs[0] if count == 1 else e("Concat", *limbs, axis=0)
            matrix = e("Transpose", joined, perm=[1, 0])
        return matrix, e.builder.initializer(steps.numpy(), f"{self.name}_columns")

    def _inverse_units(self) -> np.ndarray:
        return (1.0 / self.units).numpy()[:, None]

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
                stored_scale(e, tensor.scale, fmt, self.name), zeros)

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
        rows = self._looked_up(e, _integer_table(self.format, offset))
        return e("Transpose", rows, perm=[1, 0]), steps.contiguous()

    def _float_rows(self, e: Emitter, with_outer: bool) -> ir.Value:
        """ŵ as float32 [N, K]."""
        n, k = self.outputs, self.inputs
        values = element_values(e, self.tensor.data, self.format, self.name, [n], self._padded)
        x = scaled_values(e, self.tensor, values, self.name, k, self._padded)
        if with_outer and self.tensor.tensor_scale is not None:
            x = e("Mul", x, self.outer)
        return x

    @property
    def _padded(self) -> int:
        block = self.format.block
        return self.inputs if block is None else self.inputs + -self.inputs % block[1]

    def _looked_up(self, e: Emitter, table: np.ndarray) -> ir.Value:
        data = e.builder.initializer(self.tensor.data, self.name)
        return unpacked(e, data, self.format.bits, table, [self.outputs], self.inputs)


def element_values(e: Emitter, data: Tensor | ir.Value, fmt: ScaledFormat, name: str,
                   lead: Sequence[int], padded: int) -> ir.Value:
    """Stored data [*lead, …] as unscaled float32 element values [*lead, padded].

    ``lead``: leading sizes; 0 copies the input's.
    """
    value = e.builder.initializer(data, name) if isinstance(data, Tensor) else data
    if not is_packed(fmt):
        unit = float(getattr(fmt.element, "unit", 1.0))
        if fmt.element.storage == torch.uint8 and not fmt.zero_point:
            return e("Gather", e.f32(_table(fmt)), e("Cast", value, to=INT32))
        x = e("Cast", value, to=FLOAT)
        return x if unit == 1.0 else e("Mul", x, unit)
    return unpacked(e, value, fmt.bits, _table(fmt), lead, padded)


def scaled_values(e: Emitter, tensor: ScaledTensor, values: ir.Value, name: str, size: int,
                  padded: int) -> ir.Value:
    """Element values [N, padded] times their stored block scales, cropped to [N, size]."""
    fmt, rows = tensor.format, tensor.shape[0]
    scale = stored_scale(e, tensor.scale, fmt, name)
    zero = None
    if tensor.zero_point is not None:
        stored = e.builder.initializer(tensor.zero_point, f"{name}_zero")
        zero = e("Cast", stored, to=FLOAT)
    kind = fmt.granularity.kind
    if kind == "block":
        assert fmt.block is not None
        values = e("Reshape", values, e.ints(rows, padded // fmt.block[1], fmt.block[1]))
        scale = e.unsqueeze(scale, -1)
        zero = None if zero is None else e.unsqueeze(zero, -1)
    elif kind == "tile":
        assert fmt.block is not None
        height, width = fmt.block
        if rows % height:
            values = e("Pad", values, e.ints(0, 0, -rows % height, 0))
        values = e("Reshape", values, e.ints(-(-rows // height), height, padded // width, width))
        scale = e.unsqueeze(e.unsqueeze(scale, -1), 1)
        zero = None if zero is None else e.unsqueeze(e.unsqueeze(zero, -1), 1)
    x = e("Mul", values if zero is None else e("Sub", values, zero), scale)
    if kind in ("block", "tile"):
        x = e("Reshape", x, e.ints(-1, padded))
    return crop(e, x, rows if kind == "tile" and rows % (fmt.block or (1, 1))[0] else None,
                size if padded != size else None)


def crop(e: Emitter, x: ir.Value, rows: int | None, columns: int | None) -> ir.Value:
    """The first rows and columns of a matrix; None keeps all."""
    for axis, size in ((0, rows), (1, columns)):
        if size is not None:
            x = e("Slice", x, e.ints(0), e.ints(size), e.ints(axis))
    return x


def stored_scale(e: Emitter, scale: Tensor | ir.Value, fmt: ScaledFormat, name: str) -> ir.Value:
    """Stored scales as float32."""
    value = e.builder.initializer(scale, f"{name}_scale") if isinstance(scale, Tensor) else scale
    if fmt.scale.native is None:
        table = decode(torch.arange(256, dtype=torch.uint8), fmt.scale).numpy()
        return e("Gather", e.f32(table), e("Cast", value, to=INT32))
    if fmt.scale.native == torch.float32:
        return value
    return e("Cast", value, to=FLOAT)


def unpacked(e: Emitter, data: ir.Value, bits: int, table: np.ndarray, lead: Sequence[int],
             count: int) -> ir.Value:
    """Packed codes [*lead, bytes] looked up in ``table`` [2^bits]: [*lead, count].

    Two and four bits: one gather per byte, of all its codes. Other widths are shifted out first.
    """
    if 8 % bits == 0:
        per_byte = 8 // bits
        codes = (np.arange(256)[:, None] >> (bits * np.arange(per_byte))) & ((1 << bits) - 1)
        entries = e.builder.constant(table[codes], table.dtype)
        x = e("Gather", entries, e("Cast", data, to=INT32))
        total = -(-count // per_byte) * per_byte
        x = e("Reshape", x, e.ints(*lead, total))
    else:
        codes, total = _shifted_out(e, data, bits, lead, count)
        x = e("Gather", e.builder.constant(table, table.dtype), e("Cast", codes, to=INT32))
    if total != count:
        x = e("Slice", x, e.ints(0), e.ints(count), e.ints(-1))
    return x


def _shifted_out(e: Emitter, data: ir.Value, bits: int, lead: Sequence[int],
                 count: int) -> tuple[ir.Value, int]:
    """Codes of 3, 5, 6 or 7 bits, little-endian, as uint8 [*lead, total]."""
    group = 8 // math.gcd(bits, 8)
    width = group * bits // 8
    groups = -(-count // group)
    rank = len(lead) + 1
    missing = groups * width - -(-count * bits // 8)
    if missing:
        data = e("Pad", data, e.ints(*[0] * (2 * rank - 1), missing))
    data = e("Reshape", data, e.ints(*lead, groups, width))
    columns = [e("Slice", data, e.ints(i), e.ints(i + 1), e.ints(-1)) for i in range(width)]
    codes = [_code(e, columns, i * bits, bits) for i in range(group)]
    joined = e("Concat", *codes, axis=-1)
    return e("Reshape", joined, e.ints(*lead, groups * group)), groups * group


def _code(e: Emitter, columns: Sequence[ir.Value], start: int, bits: int) -> ir.Value:
    """The code at bit offset ``start`` of the bytes ``columns``."""
    first, offset = divmod(start, 8)
    code = columns[first]
    if offset:
        code = e("BitShift", code, e.u8(offset), direction="RIGHT")
    if offset + bits > 8:
        high = e("BitShift", columns[first + 1], e.u8(8 - offset), direction="LEFT")
        code = e("BitwiseOr", code, high)
    return e("BitwiseAnd", code, e.u8((1 << bits) - 1))


@functools.cache
def _table(fmt: ScaledFormat) -> np.ndarray:
    """float32 value of each code; with a zero point the code itself."""
    codes = torch.arange(1 << fmt.bits)
    if fmt.zero_point:
        return codes.float().numpy()
    if isinstance(fmt.element, IntegerElement):
        half = 1 << (fmt.bits - 1)
        return (((codes ^ half) - half).float() * fmt.element.unit).numpy()
    return decode(codes.to(torch.uint8), fmt.element).numpy()


def _integer_table(fmt: ScaledFormat, offset: int) -> np.ndarray:
    """int8 value of each packed integer code, minus ``offset`` where codes are unsigned."""
    codes = torch.arange(1 << fmt.bits)
    half = 1 << (fmt.bits - 1)
    values = codes - offset if fmt.zero_point else (codes ^ half) - half
    return values.to(torch.int8).numpy()


def constant_matrix(e: Emitter, tensor: ScaledTensor, name: str) -> ir.Value:
    """x̂ of a constant of any rank and axis, float32, in its logical shape; folded at load."""
    axis = tensor.axis % len(tensor.shape)
    moved = [size for i, size in enumerate(tensor.shape) if i != axis] + [tensor.shape[axis]]
    size, block = moved[-1], tensor.format.block
    padded = size if block is None else size + -size % block[1]
    rows = math.prod(moved[:-1])
    flat = dataclasses.replace(
        tensor, data=tensor.data.reshape(rows, -1), shape=torch.Size([rows, size]), axis=-1,
        scale=_flat_scale(tensor.scale, tensor.format, rows),
        zero_point=None if tensor.zero_point is None else
        _flat_scale(tensor.zero_point, tensor.format, rows))
    values = element_values(e, flat.data, flat.format, name, [rows], padded)
    x = scaled_values(e, flat, values, name, size, padded)
    if tensor.tensor_scale is not None:
        x = e("Mul", x, float(tensor.tensor_scale))
    if len(moved) != 2:
        x = e("Reshape", x, e.ints(*moved))
    if axis == len(moved) - 1:
        return x
    order = list(range(len(moved) - 1))
    order.insert(axis, len(moved) - 1)
    return e("Transpose", x, perm=order)


def _flat_scale(scale: Tensor, fmt: ScaledFormat, rows: int) -> Tensor:
    """Stored scales with all leading axes as one; tiles keep theirs."""
    if fmt.granularity.kind in ("row", "block"):
        return scale.reshape(rows, -1)
    return scale.reshape(-1, scale.shape[-1]) if fmt.granularity.kind == "tile" else scale


def computed_values(e: Emitter, parts: Sequence[ir.Value], fmt: ScaledFormat, rank: int,
                    size: int) -> ir.Value:
    """x̂ [..., size] of parts computed when the graph runs (rows gathered from a table)."""
    block = fmt.block
    padded = size if block is None else size + -size % block[1]
    x = element_values(e, parts[0], fmt, "rows", [0] * (rank - 1), padded)
    scale = stored_scale(e, parts[1], fmt, "rows")
    zero = e("Cast", parts[-1], to=FLOAT) if fmt.zero_point else None
    if block is not None:
        x = e.split_last(x, rank, padded, block[1])
        scale = e.unsqueeze(scale, -1)
        zero = None if zero is None else e.unsqueeze(zero, -1)
    x = e("Mul", x if zero is None else e("Sub", x, zero), scale)
    if fmt.two_level:
        x = e("Mul", x, parts[2])
    return x if block is None else e.join_last(x, rank, size, block[1])
