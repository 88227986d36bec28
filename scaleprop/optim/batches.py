"""``storage``'s numbers for many tensors at once, for devices where starting an operator costs more
than what it does: a few operators for all tensors of one kind, two or three for each alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleprop.optim import storage
from scaleprop.optim.storage import StateFormat

Stored = tuple[Tensor, Tensor]


def decode_states(stored: Sequence[Stored], fmt: StateFormat, dtype: torch.dtype) -> list[Tensor]:
    """``storage.decode_state`` of each; they share memory."""
    exponents = torch.cat([exponent for _, exponent in stored])
    parts = [storage.rows_of(_bytes(data), fmt.block).view(-1) for data, _ in stored]
    joined = torch.cat(parts).view(stored[0][0].dtype)
    rows, spread = _spread(joined, exponents, [part.numel() for part in parts], fmt)
    values = storage.shifted(storage.values_of(rows, fmt, dtype), spread).to(dtype).view(-1)
    return [part[:data.numel()].view(data.shape) for part, (data, _) in zip(
        values.split([part.numel() for part in parts]), stored, strict=True)]


def encode_states(
    given: Sequence[Tensor], fmt: StateFormat, bits: Sequence[Tensor] | None = None
) -> list[Stored]:
    """``storage.encode_state`` of each, all of one dtype, none empty; in memory of their own.

    bits: ``random_bits`` for each, to round stochastically with.
    """
    dtype = given[0].dtype
    parts = [rows_of(x, fmt).view(-1) for x in given]
    sizes = [part.numel() for part in parts]
    joined = torch.cat(parts)
    finite = storage.finite_of(joined, fmt, dtype)
    size = finite.abs()
    amax = size.view(-1, fmt.block).amax(1) if fmt.block else (
        torch.stack([part.amax() for part in size.split(sizes)]))
    exponents = storage.exponents_of(amax, fmt.top)
    rows, spread = _spread(joined, exponents, sizes, fmt)
    drawn = torch.cat([part.view(-1) for part in bits]).view(rows.shape) if bits else None
    codes = storage.encode_rows(rows, finite.view(rows.shape), spread, fmt, drawn)
    counts = [size // fmt.block if fmt.block else 1 for size in sizes]
    return [
        (part[:x.numel()].view(x.shape).clone(), exponent.clone())
        for x, part, exponent in zip(given, codes.view(-1).split(sizes),
                                     exponents.to(torch.int16).split(counts), strict=True)
    ]


def rows_of(x: Tensor, fmt: StateFormat) -> Tensor:
    """What ``storage.encode_state`` draws random bits for."""
    return storage.rows_of(x.detach().to(storage.work_dtype(x.dtype)), fmt.block)


def _spread(
    joined: Tensor, exponents: Tensor, sizes: list[int], fmt: StateFormat
) -> tuple[Tensor, Tensor]:
    """Rows of values, and their exponents, which broadcast to them: of blocks, or of all."""
    if fmt.block:
        return joined.view(-1, fmt.block), exponents[:, None]
    lengths = torch.tensor(sizes, device=joined.device)
    return joined, exponents.repeat_interleave(lengths, output_size=joined.numel())


def _bytes(data: Tensor) -> Tensor:
    """Numbers of one byte as integers: not every device pads or joins others."""
    return data.view(torch.uint8) if data.dtype.itemsize == 1 else data
