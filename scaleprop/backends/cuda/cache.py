"""Keys and values of a decoder, stored quantized, appended to and attended over in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.backends.cuda.attention import Masking, attend
from scaleprop.backends.cuda.launching import as_bytes
from scaleprop.backends.cuda.quantizing import quantize_groups, quantize_rows
from scaleprop.errors import FormatError
from scaleprop.formats.scaled import Granularity, ScaledFormat
from scaleprop.formats.tensor import storage_layout

Formats = tuple[ScaledFormat | None, ScaledFormat | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Room for ``capacity`` positions of each sequence; ``empty`` makes one.

    keys, values: stored parts of [B, G, capacity, D] along D; one tensor of floats where the
    format is None. lengths: int32 [B], positions that hold something; may be written to.

    Nothing is allocated that outlives a call and nothing waits for the device, so that a CUDA graph
    can hold every method.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    lengths: Tensor
    formats: Formats

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], formats: Formats,
              dtype: torch.dtype = torch.bfloat16,
              device: torch.device | str | None = None) -> KVCache:
        """For ``shape`` [B, G, capacity, D]; ``dtype`` is that of what has no format.

        Raises:
            FormatError: for formats that rows cannot be appended in.
        """
        def room(fmt: ScaledFormat | None) -> list[Tensor]:
            layout = [(shape, dtype)] if fmt is None else storage_layout(fmt, shape)
            if fmt is not None:
                _check_appendable(fmt, shape[-1])
            return [torch.zeros(size, dtype=kind, device=device) for size, kind in layout]

        lengths = torch.zeros(shape[0], dtype=torch.int32, device=device)
        return cls(keys=room(formats[0]), values=room(formats[1]), lengths=lengths,
                   formats=formats)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Quantize [B, G, T, D] into the T positions after each sequence's last.

        Sequences of which fewer are meant: lower ``lengths`` afterwards.

        Raises:
            FormatError: for other shapes; where a sequence is full, unless ``lengths`` are on a
                device: there the device's own assertion fails.
        """
        batch, groups, capacity = self.keys[0].shape[:3]
        count = keys.shape[2] if keys.ndim == 4 else 0
        for x, parts in ((keys, self.keys), (values, self.values)):
            if x.ndim != 4 or x.shape[:3] != (batch, groups, count) or (
                    len(parts) == 1 and x.shape != (*x.shape[:3], parts[0].shape[3])):
                raise FormatError(f"new keys or values are {list(x.shape)}: pass [B, G, T, D], B "
                                  f"{batch} and G {groups}")
        if not self.lengths.is_cuda and bool((self.lengths + count > capacity).any()):
            raise FormatError(f"{count} more positions after {self.lengths.tolist()}: the cache "
                              f"holds {capacity}")
        place = self.lengths.to(torch.int64)[:, None] + torch.arange(count, device=keys.device)
        for x, parts, fmt in ((keys, self.keys, self.formats[0]),
                              (values, self.values, self.formats[1])):
            rows = [x.to(parts[0].dtype)] if fmt is None else quantized_rows(x, fmt)
            for part, new in zip(parts, rows, strict=True):
                new = new.reshape(batch, groups, count, -1)
                index = place[:, None, :, None].expand(new.shape)
                as_bytes(part).scatter_(2, index, as_bytes(new))
        self.lengths.add_(count)

    def attend(self, q: Tensor, masking: Masking | None = None,
               splits: int | None = None) -> Tensor:
        """Attention of q [B, H, T, D], the last T positions' queries: see ``attention.attend``."""
        return attend(q, self.keys, self.values, self.lengths, self.formats, masking, splits)


def quantized_rows(x: Tensor, fmt: ScaledFormat) -> list[Tensor]:
    """Stored parts of x [..., D], in a format whose scales are its rows' own.

    Raises:
        FormatError: for other formats.
    """
    _check_appendable(fmt, x.shape[-1])
    if fmt.block is None:
        return quantize_rows(x.reshape(-1, x.shape[-1]), fmt)
    if not fmt.zero_point:
        return quantize_groups(x.reshape(-1, x.shape[-1]), fmt)[0]
    columns = fmt.block[1]  # each group is a row, and packs as one
    parts = quantize_rows(x.reshape(-1, columns), fmt.replace(granularity=Granularity("row")))
    rows = x.shape[:-1].numel()
    return [part.reshape(rows, -1) for part in parts]


def _check_appendable(fmt: ScaledFormat, depth: int) -> None:
    rows = fmt.granularity.kind == "row" or (fmt.block is not None and fmt.block[0] == 1)
    if not rows or fmt.two_level:
        raise FormatError(f"{fmt.long_name!r}: positions share scales, so that none can be "
                          "appended; use [row] or [1xn] groups of one level")
    if fmt.zero_point and fmt.block is not None and (
            depth % fmt.block[1] or fmt.block[1] * fmt.bits % 8):
        raise FormatError(f"{fmt.long_name!r}: no kernel fills up groups with zero points; use "
                          f"groups that divide {depth}")
