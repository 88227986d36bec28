"""``ScaledTensor``: a quantized tensor as it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.packing import crop_last, packed_size, unpack
from scaleprop.formats.rounding import decode
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.formats.scales import Scales, decoded_scale


def normalized_axis(axis: int, rank: int) -> int:
    """``axis`` in 0..rank-1.

    Raises:
        FormatError: out of range, or a tensor without axes.
    """
    if rank == 0:
        raise FormatError("a tensor without axes has none to quantize along: reshape it to [1]")
    if not -rank <= axis < rank:
        raise FormatError(f"axis {axis} is out of range for {rank} axes: use {-rank} to {rank - 1}")
    return axis % rank


def moved_shape(shape: Sequence[Any], axis: int) -> tuple[Any, ...]:
    """``shape`` with ``axis`` last."""
    index = normalized_axis(axis, len(shape))
    return (*shape[:index], *shape[index + 1:], shape[index])


def storage_layout(fmt: ScaledFormat, shape: Sequence[Any],
                   axis: int = -1) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """(shape, dtype) of each part of a tensor of this ``shape``: what is stored, without data."""
    grouping = Grouping(fmt.granularity, moved_shape(shape, axis))
    last = grouping.padded
    if is_packed(fmt):
        last = packed_size(last, fmt.bits)
    parts = [((*grouping.shape[:-1], last), data_dtype(fmt)),
             (grouping.scale_shape, fmt.scale.storage)]
    if fmt.two_level:
        parts.append(((), torch.float32))
    if fmt.zero_point:
        parts.append((grouping.scale_shape, torch.uint8))
    return parts


def is_packed(fmt: ScaledFormat) -> bool:
    """Whether data is packed codes rather than one stored number an element."""
    return fmt.element.packed


def data_dtype(fmt: ScaledFormat) -> torch.dtype:
    """dtype of the stored data."""
    return torch.uint8 if fmt.zero_point else fmt.element.storage


def codes_of(data: Tensor, fmt: ScaledFormat, count: Any) -> Tensor:
    """Stored data as codes that ``decode`` takes: the first ``count`` of each row.

    int8 for symmetric integers, the native float8, else uint8 (int32 above eight bits).
    """
    if not is_packed(fmt):
        return crop_last(data, count)
    codes = unpack(data, fmt.bits, count)
    if isinstance(fmt.element, IntegerElement) and not fmt.zero_point:
        half = 1 << (fmt.bits - 1)
        return ((codes ^ half) - half).to(torch.int8)
    return codes if fmt.bits > 8 else codes.to(torch.uint8)


def scales_of(parts: Sequence[Tensor], fmt: ScaledFormat, grouping: Grouping,
              dtype: torch.dtype) -> Scales:
    """The stored scales, spread over the grouped view, in ``dtype``."""
    scale = grouping.spread(decoded_scale(parts[1], fmt).to(dtype))
    outer = parts[2].to(dtype) if fmt.two_level else None
    zero_point = grouping.spread(parts[-1].to(dtype)) if fmt.zero_point else None
    return Scales(scale, outer, zero_point)


def dequantize_parts(parts: Sequence[Tensor], fmt: ScaledFormat, shape: Sequence[Any],
                     axis: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    """x̂ of the parts of a tensor of this logical shape. Traceable.

    Computed in float32 and rounded to ``dtype``; in float64, exactly, where that is asked for.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    grouping = Grouping(fmt.granularity, moved_shape(shape, axis))
    codes = codes_of(parts[0], fmt, grouping.padded)
    values = codes.to(work) if fmt.zero_point else decode(codes, fmt.element, work)
    scales = scales_of(parts, fmt, grouping, work)
    grouped = grouping.split(values)
    if scales.zero_point is not None:
        grouped = grouped - scales.zero_point
    return grouping.join(scales.restore(grouped)).to(dtype).movedim(-1, axis)


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A quantized tensor: x̂ = values · scale (· tensor_scale).

    data: stored elements, quantized axis last: a torch float8 dtype, int8, uint8, or codes packed
        into uint8; the last axis padded to whole blocks.
    scale: in the format's scale dtype (UE5M3: uint8 codes). Shapes, for a tensor [..., K] with its
        quantized axis last: [tensor] (); [row] [..., 1]; [channel] [K]; [1xb] [..., ⌈K/b⌉];
        [rxc] [..., ⌈R/r⌉, ⌈K/c⌉].
    tensor_scale: () float32. zero_point: uint8, shaped as scale.
    shape, axis, dtype: of the tensor that was quantized.
    """

    data: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    zero_point: Tensor | None
    format: ScaledFormat
    shape: torch.Size
    axis: int
    dtype: torch.dtype

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor], fmt: str | ScaledFormat, shape: Sequence[int],
                   axis: int = -1, dtype: torch.dtype = torch.float32) -> ScaledTensor:
        """A tensor from its stored parts, as ``parts`` lists them.

        Raises:
            FormatError: where number, shape or dtype of a part is not what the format stores.
        """
        fmt = parse(fmt)
        layout = storage_layout(fmt, shape, axis)
        if len(parts) != len(layout):
            raise FormatError(f"format {str(fmt)!r} has {len(layout)} parts, not {len(parts)}")
        names = ["data", "scale"] + ["tensor_scale"] * fmt.two_level + ["zero_point"]
        for name, part, (size, kind) in zip(names, parts, layout, strict=False):
            if tuple(part.shape) != size or part.dtype != kind:
                raise FormatError(f"format {str(fmt)!r}: {name} is {part.dtype} "
                                  f"{list(part.shape)}, but is stored as {kind} {list(size)}")
        return cls(data=parts[0], scale=parts[1], tensor_scale=parts[2] if fmt.two_level else None,
                   zero_point=parts[-1] if fmt.zero_point else None, format=fmt,
                   shape=torch.Size(shape), axis=axis, dtype=dtype)

    @property
    def parts(self) -> list[Tensor]:
        """[data, scale, (tensor_scale), (zero_point)]."""
        extra = [part for part in (self.tensor_scale, self.zero_point) if part is not None]
        return [self.data, self.scale, *extra]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """x̂, in the original shape and (unless stated) dtype."""
        return dequantize_parts(self.parts, self.format, self.shape, self.axis,
                                dtype or self.dtype)

    def codes(self) -> Tensor:
        """Integer codes, one an element: int8 for symmetric integers, else uint8 (int32 above
        eight bits). Shape: logical, quantized axis last, padding removed."""
        codes = codes_of(self.data, self.format, self.shape[self.axis])
        return codes.view(torch.uint8) if codes.dtype.is_floating_point else codes

    def values(self) -> Tensor:
        """Element values before scaling (zero point subtracted), float32, shaped as ``codes``."""
        codes = codes_of(self.data, self.format, self.shape[self.axis])
        if self.zero_point is None:
            return decode(codes, self.format.element)
        grouping = Grouping(self.format.granularity, moved_shape(self.shape, self.axis))
        zero_point = grouping.spread(self.zero_point.to(torch.float32))
        return grouping.join(grouping.split(codes.to(torch.float32)) - zero_point)

    def __repr__(self) -> str:
        return (f"ScaledTensor({str(self.format)!r}, shape={list(self.shape)}, axis={self.axis}, "
                f"dtype={self.dtype}, nbytes={self.nbytes})")
