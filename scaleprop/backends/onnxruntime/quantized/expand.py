"""Stored codes and scales to numbers: nodes on constants, which onnxruntime folds at load.

The file keeps the format's own storage. Few nodes and small intermediates matter here: folding
runs once, but on every weight. The same nodes serve rows of a table gathered at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from scaleprop.backends.onnxruntime.quantized.emit import FLOAT, INT32, INT64, Emitter
from scaleprop.formats import ScaledTensor
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.rounding import decode
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import is_packed

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def why_not(fmt: ScaledFormat) -> str | None:
    """Why stored tensors of this format cannot be expanded; None where they can."""
    if fmt.bits > 8:
        return f"{fmt.element.name} has {fmt.bits} bits; codes of at most 8 bits are supported"
    return None


def element_values(e: Emitter, data: Tensor | ir.Value, fmt: ScaledFormat, name: str,
                   lead: Sequence[int], padded: int) -> ir.Value:
    """Stored data [*lead, …] as unscaled float32 element values [*lead, padded].

    ``lead``: leading sizes; 0 copies the input's.
    """
    value = e.builder.initializer(data, name) if isinstance(data, Tensor) else data
    if not is_packed(fmt):
        if value.dtype == ir.DataType.UINT8 and fmt.element.storage.is_floating_point:
            return e("Gather", e.f32(byte_table(fmt.element.storage)), e("Cast", value, to=INT32))
        unit = float(getattr(fmt.element, "unit", 1.0))
        if fmt.element.storage == torch.uint8 and not fmt.zero_point:
            return e("Gather", e.f32(value_table(fmt)), e("Cast", value, to=INT32))
        x = e("Cast", value, to=FLOAT)
        return x if unit == 1.0 else e("Mul", x, unit)
    return unpacked(e, value, fmt.bits, value_table(fmt), lead, padded)


def scaled_values(e: Emitter, tensor: ScaledTensor, values: ir.Value, name: str, size: int,
                  padded: int, factors: Array | None = None) -> ir.Value:
    """Element values [N, padded] times their stored block scales, cropped to [N, size].

    factors: powers of two [N, 1] that rows are multiplied by as well (not for tiles).
    """
    fmt, rows = tensor.format, tensor.shape[0]
    scale = stored_scale(e, tensor.scale, fmt, name)
    if factors is not None:
        scale = e("Mul", scale, e.f32(factors))
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
    if value.dtype == ir.DataType.UINT8:
        return e("Gather", e.f32(byte_table(fmt.scale.native)), e("Cast", value, to=INT32))
    return e("Cast", value, to=FLOAT)


def unpacked(e: Emitter, data: ir.Value, bits: int, table: Array, lead: Sequence[int],
             count: int) -> ir.Value:
    """Packed codes [*lead, bytes] looked up in ``table`` [2^bits]: [*lead, count].

    Two and four bits: one gather per byte, of all its codes. Other widths are assembled first.
    """
    if 8 % bits == 0:
        per_byte = 8 // bits
        codes = (np.arange(256)[:, None] >> (bits * np.arange(per_byte))) & ((1 << bits) - 1)
        entries = e.builder.constant(table[codes], table.dtype)
        x = e("Gather", entries, e("Cast", data, to=INT32))
        total = -(-count // per_byte) * per_byte
        x = e("Reshape", x, e.ints(*lead, total))
    else:
        codes, total = _assembled(e, data, bits, lead, count)
        x = e("Gather", e.builder.constant(table, table.dtype), codes)
    if total != count:
        x = e("Slice", x, e.ints(0), e.ints(count), e.ints(-1))
    return x


def by_block(e: Emitter, data: Tensor, name: str, bits: int, table: Array,
             block_code: ir.Value, block: int, count: int) -> ir.Value:
    """Packed codes looked up in a table [block codes, 2^bits, L] by code and by block.

    data: [N, bytes], whole blocks. block_code: int32 [N, ⌈K/block⌉]. Gives [N, count·L].
    """
    rows, blocks, limbs = data.shape[0], -(-count // block), table.shape[-1]
    value = e.builder.initializer(data, name)
    if 8 % bits == 0 and (block * bits) % 8 == 0:
        per_byte, entries = 8 // bits, 256
        index = e("Cast", value, to=INT32)
        split = (np.arange(256)[:, None] >> (bits * np.arange(per_byte))) & ((1 << bits) - 1)
        table = table[:, split]
    else:
        per_byte, entries = 1, 1 << bits
        index, total = _assembled(e, value, bits, [rows], blocks * block)
        index = e("Cast", index, to=INT32) if bits in (5, 7) else index
        index = crop(e, index, None, blocks * block if total != blocks * block else None)
    index = e("Reshape", index, e.ints(rows, blocks, block // per_byte))
    offset = e("Mul", block_code, e.builder.constant(entries, np.int32))
    index = e("Add", index, e.unsqueeze(offset, -1))
    entry = e.builder.constant(table.reshape(-1, per_byte * limbs), table.dtype)
    x = e("Reshape", e("Gather", entry, index), e.ints(rows, blocks * block * limbs))
    return crop(e, x, None, count * limbs if blocks * block != count else None)


def limb_table(fmt: ScaledFormat, top: float, steps: int, count: int) -> Array:
    """int8 limbs of value·top·2^-shift for shift 0..steps: [steps + 1, codes, count]."""
    scales = top * 2.0 ** -np.arange(steps + 1, dtype=np.float64)[:, None]
    rest = value_table(fmt).astype(np.float64) * scales
    limbs: list[Array] = []
    for _ in range(count):
        limb = np.clip(np.rint(rest), -127, 127)  # codes that no such block has may be larger
        limbs.append(limb.astype(np.int8))
        rest = (rest - limb) * 128.0
    return np.stack(limbs, axis=-1)


def _assembled(e: Emitter, data: ir.Value, bits: int, lead: Sequence[int],
               count: int) -> tuple[ir.Value, int]:
    """Codes of 3, 5, 6 or 7 bits, little-endian, as integers [*lead, total].

    Bytes of a group make one number, of which the codes are the digits.
    """
    group = 8 // math.gcd(bits, 8)
    width = group * bits // 8
    groups = -(-count // group)
    missing = groups * width - -(-count * bits // 8)
    if missing:
        data = e("Pad", data, e.ints(*[0] * (2 * len(lead) + 1), missing))
    kind, number = (INT32, np.int32) if width < 4 else (INT64, np.int64)
    split = e("Reshape", e("Cast", data, to=kind), e.ints(*lead, groups, width))
    weights = e.builder.constant(256 ** np.arange(width, dtype=np.int64), number)
    whole = e("ReduceSum", e("Mul", split, weights), e.ints(-1), keepdims=1)
    digits: list[ir.Value] = []
    for index in range(group):
        high = e("Div", whole, e.builder.constant(1 << (bits * index), number)) if index else whole
        last = index == group - 1
        digits.append(high if last else e("Mod", high, e.builder.constant(1 << bits, number)))
    return e("Reshape", e("Concat", *digits, axis=-1), e.ints(*lead, groups * group)), \
        groups * group


@functools.cache
def byte_table(dtype: torch.dtype) -> Array:
    """float32 value of each byte of a float8 type."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


@functools.cache
def value_table(fmt: ScaledFormat) -> Array:
    """float32 value of each code; with a zero point the code itself."""
    codes = torch.arange(1 << fmt.bits)
    if fmt.zero_point:
        return codes.float().numpy()
    if isinstance(fmt.element, IntegerElement):
        half = 1 << (fmt.bits - 1)
        return (((codes ^ half) - half).float() * fmt.element.unit).numpy()
    return decode(codes.to(torch.uint8), fmt.element).numpy()


def integer_table(fmt: ScaledFormat, offset: int) -> Array:
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
