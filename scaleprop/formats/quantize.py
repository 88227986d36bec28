"""``quantize``, ``dequantize`` and ``fake_quantize``: tensors into scaled formats and back.

Work is done in float32 (bfloat16 and float16 are widened first, exactly) and in float64 for float64
data, which is therefore rounded once, straight from float64; scales are then float32 or narrower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import ElementFormat, FloatElement, IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.packing import pack
from scaleprop.formats.rounding import (
    Rounding,
    encode,
    goes_up,
    has_nan,
    parse_rounding,
    round_tensor,
)
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.formats.scales import Scales, find_scales, given_scales
from scaleprop.formats.tensor import (
    ScaledTensor,
    is_packed,
    normalized_axis,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
GENERATOR_BITS = 16


@dataclasses.dataclass(frozen=True)
class _Work:
    """A tensor on its way: grouped, with its scales and (grouped) random bits."""

    grouped: Tensor
    grouping: Grouping
    scales: Scales
    rounding: Rounding
    bits: Tensor | None
    given: bool


def check_input(x: Tensor, axis: int, rounding: Rounding, bits: Tensor | None) -> None:
    """Raise ``FormatError`` for a tensor, axis or random bits that cannot be taken."""
    if x.dtype not in _FLOATS:
        raise FormatError(f"cannot quantize {x.dtype}: convert to float32, bfloat16, float16 or "
                          "float64 first")
    normalized_axis(axis, x.ndim)
    if not rounding.stochastic:
        if bits is not None:
            raise FormatError("bits are given but rounding is 'nearest': pass "
                              "rounding='stochastic', or no bits")
        return
    if bits is None:
        raise FormatError(f"rounding {rounding.mode!r} needs bits: a tensor of integers shaped as "
                          "x, uniform on 0..2^n-1")
    if bits.dtype not in _INTEGERS:
        raise FormatError(f"bits are {bits.dtype}: pass integers, such as torch.uint8")
    if tuple(bits.shape) != tuple(x.shape):
        raise FormatError(f"bits have shape {list(bits.shape)}, x has {list(x.shape)}: one number "
                          "of random bits an element")


def check_bits_range(rounding: Rounding, bits: Tensor | None) -> None:
    """Raise ``FormatError`` where a given number has more bits than stated; reads the data."""
    if bits is None or bits.numel() == 0 or (bits.dtype == torch.uint8 and rounding.bits >= 8):
        return
    low, high = (int(end) for end in bits.to(torch.int64).aminmax())
    if low < 0 or high >= 1 << rounding.bits:
        raise FormatError(f"bits lie in {low}..{high}, but {rounding.mode} takes {rounding.bits} "
                          f"bits, 0..{(1 << rounding.bits) - 1}: state the width, as in "
                          f"'{rounding.mode}:{max(high, 1).bit_length()}'")


def _prepare(x: Tensor, fmt: ScaledFormat, axis: int, rounding: Rounding, bits: Tensor | None,
             scales: Sequence[Tensor] | None) -> _Work:
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    moved = wide.movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape), axis)
    grouped = grouping.split(moved)
    if scales is None:
        found = find_scales(grouped, fmt, grouping)
    else:
        found = given_scales(scales, grouped, fmt, grouping)
    if bits is not None:
        bits = grouping.split(bits.to(torch.int32).movedim(axis, -1))
    return _Work(grouped, grouping, found, rounding, bits, scales is not None)


def _rounded(work: _Work, fmt: ScaledFormat) -> Tensor:
    """Grid values (codes, with a zero point), grouped; NaN only where something says NaN."""
    units = work.scales.normalize(work.grouped)
    if work.scales.zero_point is not None:
        return _affine(units, work, fmt)
    if work.given and not has_nan(fmt.element):
        units = torch.where(units.isnan(), 0.0, units)
    return round_tensor(units, fmt.element, work.rounding, work.bits)


def _affine(units: Tensor, work: _Work, fmt: ScaledFormat) -> Tensor:
    assert isinstance(fmt.element, IntegerElement) and work.scales.zero_point is not None
    if work.bits is None:
        steps = units.round()
    else:
        size = units.abs()
        below = size.floor()
        steps = torch.copysign(below + goes_up(size - below, work.rounding, work.bits), units)
    codes = (steps + work.scales.zero_point).clamp(0.0, float(fmt.element.levels))
    return torch.where(codes.isnan(), 0.0, codes) if work.given else codes


def quantize_parts(x: Tensor, fmt: ScaledFormat, axis: int = -1, rounding: Rounding | None = None,
                   bits: Tensor | None = None,
                   scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The stored parts of ``x``: the traceable core of ``quantize``, arguments already checked."""
    moved = None if bits is None else bits.movedim(axis, -1)
    work = _prepare(x.movedim(axis, -1), fmt, -1, rounding or Rounding("nearest"), moved, scales)
    rounded = _rounded(work, fmt)
    if fmt.zero_point:
        codes = rounded.nan_to_num(0.0).to(torch.uint8)
    else:
        codes = encode(rounded, fmt.element)
    data = work.grouping.join(codes, keep_padding=True)
    parts = [(pack(data, fmt.bits) if is_packed(fmt) else data).contiguous()]
    parts.append(_stored_scale(work.grouping.compact(work.scales.scale), fmt.scale))
    if work.scales.tensor_scale is not None:
        parts.append(work.scales.tensor_scale.clone())
    if work.scales.zero_point is not None:
        parts.append(work.grouping.compact(work.scales.zero_point).to(torch.uint8))
    return parts


def _stored_scale(scale: Tensor, item: FloatElement) -> Tensor:
    """Scales (float32, on the scale format's grid) in their storage dtype, as a new tensor."""
    if item.native is None:
        return encode(scale, item)
    return scale.clone() if item.native == torch.float32 else scale.to(item.native)


def fake_quantize_tensor(x: Tensor, fmt: ScaledFormat, axis: int = -1,
                         rounding: Rounding | None = None, bits: Tensor | None = None,
                         scales: Sequence[Tensor] | None = None) -> Tensor:
    """dequantize(quantize(x)) without the codes, in x's dtype: the traceable core.

    Few passes over the data, so that a compiler fuses it: amax, then one pointwise kernel.
    """
    work = _prepare(x, fmt, axis, rounding or Rounding("nearest"), bits, scales)
    values = _rounded(work, fmt)
    if work.scales.zero_point is not None:
        values = values - work.scales.zero_point
    restored = work.scales.restore(values)
    return work.grouping.join(restored).to(x.dtype).movedim(-1, axis)


def _random_bits(x: Tensor, rounding: Rounding, bits: Tensor | None,
                 generator: torch.Generator | None, name: str) -> tuple[Rounding, Tensor | None]:
    """The given bits, or fresh ones: 16 an element unless the rounding states how many."""
    if not rounding.stochastic or bits is not None:
        if generator is not None:
            raise FormatError("a generator is given but not used: it needs a stochastic rounding "
                              "and no bits")
        return rounding, bits
    if ":" not in name:
        rounding = Rounding(rounding.mode, GENERATOR_BITS)
    drawn = torch.randint(0, 1 << rounding.bits, x.shape, generator=generator, device=x.device,
                          dtype=torch.int32)
    return rounding, drawn


def _arguments(x: Tensor, fmt: str | ScaledFormat, axis: int, rounding: str,
               generator: torch.Generator | None,
               bits: Tensor | None) -> tuple[ScaledFormat, Rounding, Tensor | None]:
    parsed = parse(fmt)
    mode = parse_rounding(rounding)
    given = bits is not None
    mode, bits = _random_bits(x, mode, bits, generator, rounding)
    check_input(x, axis, mode, bits)
    if given and not torch.compiler.is_compiling():
        check_bits_range(mode, bits)
    return parsed, mode, bits


def quantize(x: Tensor, fmt: str | ScaledFormat, axis: int = -1, rounding: str = "nearest",
             generator: torch.Generator | None = None, bits: Tensor | None = None,
             scales: Sequence[Tensor] | None = None) -> ScaledTensor:
    """Quantize ``x`` (any rank ≥ 1, float32, bfloat16, float16 or float64) along ``axis``.

    rounding: ``nearest``, or ``stochastic`` and its variants (see ``rounding.Rounding``), with
        ``bits`` (integers shaped as x, 8 random bits each unless stated as in ``stochastic:16``)
        or bits drawn from ``generator`` (default: torch's own; 16 bits unless stated).
    scales: given instead of found from x: [scale], [scale, zero_point], [scale, tensor_scale], or
        [tensor_scale] alone with block scales from x. Shapes as in ``ScaledTensor``. Values beyond
        the range saturate; NaN becomes the element's NaN, or 0 where it has none.

    Raises:
        FormatError: unknown format, dtype, axis out of range, wrong bits or scales.
    """
    parsed, mode, bits = _arguments(x, fmt, axis, rounding, generator, bits)
    parts = quantize_parts(x.detach(), parsed, axis, mode, bits, scales)
    return ScaledTensor.from_parts(parts, parsed, x.shape, axis, x.dtype)


def dequantize(tensor: ScaledTensor, dtype: torch.dtype | None = None) -> Tensor:
    """x̂ of a quantized tensor, in its original dtype unless stated."""
    return tensor.dequantize(dtype)


class _StraightThrough(torch.autograd.Function):
    """fake_quantize forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def fake_quantize(x: Tensor, fmt: str | ScaledFormat, axis: int = -1, rounding: str = "nearest",
                  generator: torch.Generator | None = None, bits: Tensor | None = None,
                  scales: Sequence[Tensor] | None = None) -> Tensor:
    """``quantize(...).dequantize()`` without the codes, in x's shape and dtype; the same values to
    the last bit (but -0, which integers cannot store, may stay -0).

    Arguments as in ``quantize``. The gradient passes straight through.

    Raises:
        FormatError: as ``quantize``.
    """
    parsed, mode, bits = _arguments(x, fmt, axis, rounding, generator, bits)

    def run(data: Tensor) -> Tensor:
        return fake_quantize_tensor(data, parsed, axis, mode, bits, scales)

    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, run)  # type: ignore[no-any-return]
    return run(x)


def representable(item: ElementFormat) -> list[float]:
    """Every finite value of an element format, ascending (±0 once)."""
    values = {item.decode(code) + 0.0 for code in item.codes}
    return sorted(value for value in values if item.min <= value <= item.max)
