"""``storage``'s numbers on a CPU, bit for bit, in a fifth of the time: float32 values, ``CHUNK`` at
a time so that they stay in cache, in operations that write where they read.

Three facts replace most of the reference's steps, which remain for what they do not hold of:

- Where the largest magnitude of a tensor is finite, nothing in it is NaN or Inf.
- A multiplication by a power of two is exact while its result is a normal number. One is enough
  where ``storage.shifted`` takes two: upwards, and for codes, which have few bits.
- Codes of UE6M10, UE5M3 and E4M3 become numbers of float32 and float16 by a shift of their bits:
  exponents only count from another number, which is one more power of two. Subnormals, too.
"""

from __future__ import annotations

import math
import threading
from typing import TypeGuard

import torch
from torch import Tensor

from scaleprop.formats.elements import FloatElement
from scaleprop.optim import storage
from scaleprop.optim.storage import StateFormat

_LOCAL = threading.local()
Ends = list[tuple[float, float]]
CHUNK = 1 << 16  # values; a multiple of every block
_EXPONENT = 0x7F800000  # its bits in float32


def decode_state(data: Tensor, exponent: Tensor, fmt: StateFormat, dtype: torch.dtype) -> Tensor:
    """``storage.decode_state``."""
    if not _quick(data, dtype):
        return storage.decode_state(data, exponent, fmt, dtype)
    out = torch.empty(data.numel())
    decode_into(out, data.reshape(-1), exponent, fmt)
    return out.view(data.shape)


def encode_state(
    x: Tensor, fmt: StateFormat, generator: torch.Generator | None = None, *,
    ends: Ends | None = None, memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``storage.encode_state``. ends: ``ends_of`` the chunks of ``x``, if they are known. memory:
    to write the data to, if it suits."""
    if not _quick(x, x.dtype):
        return storage.encode_state(x, fmt, generator)
    flat = x.detach().reshape(-1)
    data = memory if _suits(memory, x, fmt) else torch.empty(x.shape, dtype=fmt.storage)
    if fmt.block:
        return data, _encode_blocks(data.view(-1), flat, fmt, generator)
    ends = ends or [ends_of(part) for part in flat.split(CHUNK)]
    exponent = _exponent(ends, fmt)
    if exponent is None:
        return storage.encode_state(x, fmt, generator)
    _encode_whole(data.view(-1), flat, ends, exponent, fmt, generator)
    return data, torch.tensor([exponent], dtype=torch.int16)


def _suits(memory: Tensor | None, x: Tensor, fmt: StateFormat) -> TypeGuard[Tensor]:
    return memory is not None and memory.shape == x.shape and memory.dtype == fmt.storage \
        and memory.is_contiguous() and memory.device == x.device


def ends_of(part: Tensor) -> tuple[float, float]:
    """The least and the largest value; NaN if there is one."""
    return part.amin().item(), part.amax().item()


def _spares(size: int) -> tuple[Tensor, Tensor]:
    """Memory for a chunk, the same again: new memory costs more than what is done in it."""
    if not hasattr(_LOCAL, "spares") or _LOCAL.spares.shape[1] < size:
        _LOCAL.spares = torch.empty(2, size)
    first, second = _LOCAL.spares
    return first[:size], second[:size]


def _quick(x: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and not flushes()


def flushes() -> bool:
    """Whether subnormal numbers are taken for 0 (``torch.set_flush_denormal``)."""
    return not torch.tensor(2.0**-126).mul_(0.5).item()


def decode_into(out: Tensor, data: Tensor, exponent: Tensor, fmt: StateFormat) -> None:
    """Write what ``encode_state`` stored to ``out``: float32, as flat as ``data``."""
    for start in range(0, out.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        blocks = piece if not fmt.block else slice(
            start // fmt.block, (start + CHUNK) // fmt.block)
        _decode_chunk(out[piece], data[piece], exponent[blocks] if fmt.block else exponent, fmt)


def _decode_chunk(out: Tensor, data: Tensor, exponent: Tensor, fmt: StateFormat) -> None:
    item = fmt.element
    if item.native is torch.float8_e4m3fn:
        shift = _from_e4m3(out, data)
    elif item.native is not None:
        out.copy_(data)
        shift = 0
    else:
        shift = _from_unsigned(out, data, item)
    if shift is None:
        out.copy_(storage.decode_state(data, exponent, fmt, torch.float32))
    elif fmt.block:
        _times_rows(out, exponent.to(torch.int32) + shift, fmt.block)
    else:
        _times(out, int(exponent) + shift, out, least=-126)


def _from_e4m3(out: Tensor, data: Tensor) -> int | None:
    """Values less a power of two, which is returned; None where a code is NaN or means Inf."""
    if (data.view(torch.uint8) & 0x7F).amax() >= 0x7E:
        return None
    # s s s s s s s s s e e e e m m m → s 0 e e e e m m m 0 0 0 0 0 0 0
    codes = data.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    out.copy_(codes.view(torch.float16))
    return 15 - 7


def _from_unsigned(out: Tensor, data: Tensor, item: FloatElement) -> int | None:
    """As ``_from_e4m3``."""
    bits = out.view(torch.int32)
    bits.copy_(data.view(torch.uint16) if data.dtype == torch.int16 else data)
    bits.bitwise_left_shift_(23 - item.fraction_bits)
    shift = 127 - item.bias
    return None if out.amax().item() >= math.ldexp(item.max, -shift) else shift


def _times(x: Tensor, exponent: int, out: Tensor, least: int = 0) -> None:
    """x·2^exponent, at once from ``least`` on, else in the two steps of ``storage.shifted``."""
    if least <= exponent <= 127:
        torch.mul(x, 2.0**exponent, out=out)
        return
    half = exponent >> 1
    torch.mul(x, 2.0**half, out=out)
    out.mul_(2.0 ** (exponent - half))


def _times_rows(x: Tensor, exponent: Tensor, block: int, least: int = -126) -> None:
    """The same for blocks of flat ``x``, the last of them shorter, in place; exponent: int32."""
    whole = x.numel() // block
    low, high = (int(end) for end in torch.aminmax(exponent))
    half = exponent >> 1
    factors = [exponent] if least <= low and high <= 127 else [half, exponent - half]
    for factor in factors:
        powers = storage.power(factor, x.dtype)
        x[:whole * block].view(-1, block).mul_(powers[:whole, None])
        if whole < len(powers):
            x[whole * block:].mul_(powers[whole])


def _exponent(ends: Ends, fmt: StateFormat) -> int | None:
    """Of a format with one; None for what is not finite, or negative in a format without sign."""
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    amax = max(-low, high)
    if any(math.isnan(high) for _, high in ends) or (fmt.unsigned and low < 0.0) \
            or not amax <= storage.limit_of(fmt, torch.float32):
        return None
    fraction, exponent = math.frexp(amax)
    return exponent - (fraction == 0.5) - fmt.top if amax else 0


def _encode_whole(
    data: Tensor, flat: Tensor, ends: Ends, exponent: int, fmt: StateFormat,
    generator: torch.Generator | None,
) -> None:
    small = min(low for low, _ in ends) < math.ldexp(fmt.element.smallest, exponent)
    for codes, part in zip(data.split(CHUNK), flat.split(CHUNK), strict=True):
        units, other = _spares(part.numel())
        if generator is not None:
            rows = part[None]
            bits = storage.random_bits(rows, generator)
            where = torch.tensor([exponent], dtype=torch.int32)
            codes.copy_(storage.encode_rows(rows, rows, where, fmt, bits)[0])
        elif fmt.element.native is not None:
            _times(part, -exponent, units)
            codes.copy_(units)
        else:
            _round_unsigned(units, part, exponent, small, fmt.element, other)
            codes.copy_(units.view(torch.int32))


def _round_unsigned(
    units: Tensor, part: Tensor, exponent: int, small: bool, item: FloatElement, spare: Tensor
) -> None:
    """Write to ``units`` the bits of the codes of ``part`` · 2^-exponent, which is not negative: to
    the nearest, ties to even, and never 0 where ``part`` is not (some may be if it is ``small``).

    Adding and subtracting 1.5·2^23 units in the last place leaves the nearest number of them. That
    is done at the scale of ``part`` if all units are normal numbers there.
    """
    digits = 23 - item.fraction_bits
    positive = part if small else None
    if exponent + item.emin - item.fraction_bits < -126 or exponent > 20:
        _times(part, -exponent, units)
        part, exponent = units, 0
    ulps = torch.bitwise_and(part.view(torch.int32), _EXPONENT,
                             out=spare.view(torch.int32)).view(torch.float32)
    ulps.clamp_(min=2.0 ** (item.emin + exponent)).mul_(1.5 * 2.0**digits)
    torch.add(part, ulps, out=units).sub_(ulps)
    if positive is not None:
        torch.sign(positive, out=spare).mul_(math.ldexp(item.smallest, exponent))
        torch.maximum(units, spare, out=units)
    units.mul_(2.0 ** (item.bias - 127 - exponent))
    units.view(torch.int32).bitwise_right_shift_(digits)


def _encode_blocks(
    data: Tensor, flat: Tensor, fmt: StateFormat, generator: torch.Generator | None
) -> Tensor:
    """Exponents; chunks that hold NaN, Inf or wrong signs by the reference."""
    exponent = torch.empty(-(-flat.numel() // fmt.block), dtype=torch.int16)
    whole = flat.numel() - flat.numel() % fmt.block
    starts = [*range(0, whole, CHUNK), *([whole] if whole < flat.numel() else [])]
    for start, stop in zip(starts, [*starts[1:], flat.numel()], strict=True):
        rows = slice(start // fmt.block, -(-stop // fmt.block))
        part, done = flat[start:stop], False
        if start < whole:
            done = _encode_chunk(data[start:stop], exponent[rows], part, fmt, generator)
        if not done:
            codes, found = storage.encode_state(part, fmt, generator)
            _bytes(data[start:stop]).copy_(_bytes(codes))
            exponent[rows] = found
    return exponent


def _encode_chunk(
    data: Tensor, exponent: Tensor, part: Tensor, fmt: StateFormat,
    generator: torch.Generator | None,
) -> bool:
    """Whether whole blocks were encoded; nothing is written or drawn where they were not."""
    rows = part.view(-1, fmt.block)
    spare, _ = _spares(part.numel())
    amax = torch.abs(rows, out=spare.view(rows.shape)).amax(1)
    if not amax.amax() <= storage.limit_of(fmt, part.dtype) or (generator is None and fmt.unsigned):
        return False
    found = storage.exponents_of(amax, fmt.top)
    if generator is not None:
        bits = storage.random_bits(rows, generator)
        codes = storage.encode_rows(rows, rows, found[:, None], fmt, bits)
        _bytes(data).copy_(_bytes(codes.view(-1)))
    else:
        spare.copy_(part)
        _times_rows(spare, -found, fmt.block, least=0)
        data.copy_(spare)
    exponent.copy_(found)
    return True


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes
