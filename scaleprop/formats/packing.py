"""Packing codes narrower (or wider) than a byte: little-endian, the first code in the lowest bits.

Four bits: two codes a byte, low nibble first. Two bits: four a byte. Six bits: four codes in three
bytes. A row that does not fill its last byte is padded with zero bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def packed_size(count: Any, bits: int) -> Any:
    """Bytes that ``count`` codes (an int or SymInt) of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., K], any integer dtype, to bytes [..., ⌈K·bits/8⌉]. Negative codes: low bits."""
    group = 8 // math.gcd(bits, 8)
    count = codes.shape[-1]
    groups = (count + group - 1) // group
    # a byte is enough where codes are narrow: what a shift drops belongs to another byte
    wide = codes.to(torch.uint8 if bits <= 8 else torch.int32) & ((1 << bits) - 1)
    wide = pad_last(wide, groups * group).reshape(*codes.shape[:-1], groups, group)
    columns = wide.unbind(-1)
    packed = torch.stack([_byte(columns, 8 * j, bits) for j in range(group * bits // 8)], dim=-1)
    flat = packed.to(torch.uint8).reshape(*codes.shape[:-1], groups * (group * bits // 8))
    return crop_last(flat, packed_size(count, bits))


def _byte(columns: tuple[Tensor, ...], start: int, bits: int) -> Tensor:
    """The byte at bit offset ``start`` of a group of codes."""
    result: Tensor | None = None
    for index in range(start // bits, min((start + 7) // bits + 1, len(columns))):
        shift = index * bits - start
        part = columns[index] << shift if shift >= 0 else columns[index] >> -shift
        result = part if result is None else result | part
    assert result is not None
    return result & 0xFF


def unpack(packed: Tensor, bits: int, count: Any) -> Tensor:
    """The inverse of ``pack``: the first ``count`` codes of each row, unsigned, int32."""
    group = 8 // math.gcd(bits, 8)
    width = group * bits // 8
    groups = (count + group - 1) // group
    whole = pad_last(packed, groups * width).to(torch.uint8 if bits <= 8 else torch.int32)
    columns = whole.reshape(*packed.shape[:-1], groups, width).unbind(-1)
    codes = torch.stack([_code(columns, i * bits, bits) for i in range(group)], dim=-1)
    flat = codes.reshape(*packed.shape[:-1], groups * group)
    return crop_last(flat.to(torch.int32), count)


def _code(columns: tuple[Tensor, ...], start: int, bits: int) -> Tensor:
    """The code at bit offset ``start`` of a group of bytes."""
    result: Tensor | None = None
    for index in range(start // 8, (start + bits - 1) // 8 + 1):
        shift = index * 8 - start
        part = columns[index] << shift if shift >= 0 else columns[index] >> -shift
        result = part if result is None else result | part
    assert result is not None
    return result & ((1 << bits) - 1)


def pad_last(x: Tensor, size: Any) -> Tensor:
    """``x`` with zeros appended to its last axis up to ``size``; itself where it has that."""
    missing: Any = size - x.shape[-1]
    if isinstance(missing, int) and missing == 0:
        return x
    return torch.constant_pad_nd(x, [0, missing], 0)


def crop_last(x: Tensor, size: Any) -> Tensor:
    """The first ``size`` entries of the last axis; itself where that is all."""
    missing: Any = size - x.shape[-1]
    if isinstance(missing, int) and missing == 0:
        return x
    return x[..., :size]
