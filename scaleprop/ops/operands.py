"""What a low-precision product reads: element values times block scales, and one scalar beside.

    values · outer / prescale ≈ x        values = element value · block scale

A product of two such operands is summed over exact factors, and what is one number for the whole
tensor is applied to the result: folded into the factors, it would have them rounded. Passes insert
these into joint graphs, where nothing is differentiated any more; they have no gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.elements import (
    CodebookElement,
    ElementFormat,
    FloatElement,
    IntegerElement,
)
from scaleprop.formats.grouping import Grouping, is_zero, static_shape
from scaleprop.formats.quantize import check_input
from scaleprop.formats.rounding import (
    Rounding,
    nearest,
    parse_rounding,
    round_tensor,
    stochastic,
)
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat, parse
from scaleprop.formats.scales import Scales, find_scales, find_two_level, target, whole_amax
from scaleprop.formats.tensor import normalized_axis

_BFLOAT16 = 8  # bits of its significand
_EDEN_TARGET = 256.0  # of E4M3's 448: room for what is folded into block scales
EDEN_HEADROOM = 17 / 16 * 0.93
Pair = tuple[Tensor, Tensor]


def quantize_operand(x: Tensor, format: str, axis: int, rounding: str = "nearest",
                     bits: Tensor | None = None, tensor_amax: Tensor | None = None,
                     prescale: float = 1.0, headroom: float = 1.0,
                     dtype: torch.dtype = torch.bfloat16) -> Pair:
    """(values, in ``dtype`` and x's shape; outer, a scalar of float32).

    Computed in float32; values · outer is ``fake_quantize`` of float32 x. outer: the tensor scale
    of two levels, the scale of one for the whole tensor, else 1. bits: integers shaped as x.

    tensor_amax: a scalar in place of the data's amax, for the scale of the whole tensor: held,
        delayed, or known before. Data beyond saturate; Inf becomes NaN, for loss scaling to see.
    prescale: data is multiplied by it between division by the scale, which stays, and rounding,
        so that FP4's saturation does not bias stochastic rounding (3/4 under the floor rule:
        Tseng et al., arXiv:2502.20586). The caller divides the product by it.
    headroom: amax counts as so many times as large where scales are found, for the same (17/16
        where scales are rounded to E4M3).

    Raises:
        FormatError: unknown format or rounding, wrong bits, a format with zero points, a dtype
            that would round (``exact_dtype`` tells which does not), an amax that has no use.
    """
    fmt, mode = parse(format), parse_rounding(rounding)
    check_operand(x, fmt, axis, mode, bits, tensor_amax, dtype)
    if x.ndim == 2 and fmt.granularity.rows == fmt.granularity.columns > 1:
        axis = 1  # square tiles: the same along either, and this is how data lie in memory
    moved = x.to(torch.float32).movedim(axis, -1)
    grouping = Grouping(fmt.granularity, tuple(moved.shape), axis)
    grouped = grouping.split(moved)
    scales = find_scales(grouped, fmt, grouping, tensor_amax, headroom)
    units = scales.normalize(grouped)
    if prescale != 1.0:
        units = units * prescale
    if tensor_amax is not None:
        units = units + grouped * 0.0  # NaN where Inf
    if bits is not None:
        bits = grouping.split(bits.to(torch.int32).movedim(axis, -1))
    rounded = round_tensor(units, fmt.element, mode, bits)
    values, outer = _operand(rounded, scales, fmt, grouping, dtype)
    return values.movedim(-1, axis), outer


def _operand(rounded: Tensor, scales: Scales, fmt: ScaledFormat, grouping: Grouping,
             dtype: torch.dtype) -> Pair:
    """Values, the quantized axis last, and outer."""
    if fmt.granularity.kind == "tensor":
        values, outer = rounded, scales.scale.reshape(())
    else:
        values, outer = rounded * scales.scale, scales.tensor_scale
    if outer is None:
        outer = torch.ones((), dtype=torch.float32, device=rounded.device)
    return _joined(values.to(dtype), grouping), outer


def _joined(values: Tensor, grouping: Grouping) -> Tensor:
    """``grouping.join``. Where data need no padding, as another view of a buffer: Inductor then
    goes through blocks, with a scale each, not through elements, with a division for its index."""
    if grouping.axis not in (-1, len(grouping.shape) - 1) or not grouping.whole:
        return grouping.join(values)
    shape = tuple(grouping.shape)
    strides = [math.prod(shape[index + 1:]) for index in range(len(shape))]
    return values.contiguous().as_strided(shape, strides)


def check_operand(x: Tensor, fmt: ScaledFormat, axis: int, rounding: Rounding, bits: Tensor | None,
                  tensor_amax: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ``FormatError`` for arguments that ``quantize_operand`` cannot take."""
    check_input(x, axis, rounding, bits)
    _check_dtype(fmt, dtype)
    whole = fmt.two_level or (fmt.granularity.kind == "tensor" and fmt.rule not in ("absmean",
                                                                                    "rms"))
    if tensor_amax is not None and not whole:
        raise FormatError(f"tensor_amax is given, but format {str(fmt)!r} finds no scale by the "
                          "amax of the whole tensor: pass none, or take a two-level format")
    if tensor_amax is not None and tensor_amax.ndim:
        raise FormatError(f"tensor_amax has shape {static_shape(tensor_amax.shape)}: pass a scalar")


def _check_dtype(fmt: ScaledFormat, dtype: torch.dtype) -> None:
    exact = exact_dtype(fmt)
    if dtype not in (exact, torch.float32):
        raise FormatError(f"operands of format {str(fmt)!r} would be rounded in {dtype}: use "
                          f"{' or '.join(sorted({str(exact), 'torch.float32'}))}")


def exact_dtype(format: str | ScaledFormat) -> torch.dtype:
    """bfloat16 where it holds every element value times every block scale, else float32.

    The scale of a whole tensor is not a factor. bfloat16 holds 8 bits: E2M1 · E4M3 has 6, E4M3 · a
    power of two 4. Exact down to 2^-126, below which bfloat16 goes in steps of 2^-133: what has
    E8M0 scales below 2^-110 may lose its smallest values. In float32, factors of more than 24 bits
    (those with float32 scales of rows) are rounded once, as ``fake_quantize`` rounds them.

    Raises:
        FormatError: for a format with zero points.
    """
    fmt = parse(format)
    if fmt.zero_point:
        raise FormatError(f"format {str(fmt)!r} has zero points, which operands of products in "
                          "joint graphs have not: drop '+zp'")
    bits = significand_bits(fmt.element)
    if fmt.granularity.kind != "tensor":
        power = fmt.rule in (*POWER_RULES, "rms") or not fmt.scale.has_zero
        factor = 1 if power else fmt.scale.fraction_bits + 1
        bits = bits + factor if min(bits, factor) > 1 else max(bits, factor)
    return torch.bfloat16 if bits <= _BFLOAT16 else torch.float32


def significand_bits(item: ElementFormat) -> int:
    """The most bits, from first to last one, that a value of the element has."""
    if isinstance(item, FloatElement):
        return item.fraction_bits + 1
    if isinstance(item, IntegerElement):
        return item.high.bit_length()
    assert isinstance(item, CodebookElement)
    odd = [abs(value).as_integer_ratio()[0] for value in item.values]
    return max((n // (n & -n)).bit_length() if n else 1 for n in odd)


def eden_operand(x: Tensor, format: str, axis: int, bits: Tensor, group: int = 128,
                 dtype: torch.dtype = torch.bfloat16, rounding: str = "stochastic:16",
                 headroom: float = EDEN_HEADROOM) -> Pair:
    """An unbiased operand without random bits for elements: EDEN, as in Quartet II.

    Elements are rounded to nearest. Each rotation group of ``group`` elements along ``axis`` gets
    c = ⟨x, x⟩/⟨x, Q(x)⟩, its block scales times c, these rounded stochastically by ``bits``: one
    number a block (x's shape, with blocks along ``axis``), or one an element, of which the first of
    a block counts. Unbiased over random rotations of the groups, which the caller makes. Returns
    and ``dtype`` as in ``quantize_operand``. headroom: as there; below 17/16 it trades saturation
    for resolution, which c makes up for (Quartet II: 17/16·0.93). The tensor scale aims at block
    scales of 256, so that c has room.

    Raises:
        FormatError: as ``quantize_operand``; for a format other than a two-level one of blocks with
            E4M3 or UE5M3 scales; where ``group`` is not whole blocks.
    """
    fmt, mode = parse(format), parse_rounding(rounding)
    check_eden(x, fmt, axis, mode, bits, group, dtype)
    moved = _padded(x.to(torch.float32).movedim(axis, -1), group)
    grouping = Grouping(fmt.granularity, tuple(moved.shape), axis)
    grouped = grouping.split(moved)
    amax = grouping.reduce(torch.amax, grouped.abs()) * headroom
    scales = find_two_level(grouped, fmt, grouping, amax,
                            whole_amax(amax) * (target(fmt) / _EDEN_TARGET))
    rounded = nearest(scales.normalize(grouped), fmt.element)
    share = grouping.stored(_eden_share(grouped, scales.restore(rounded),
                                        group // fmt.granularity.columns))
    drawn = _block_bits(bits, x, axis, fmt.granularity.columns, group)
    scale = stochastic(scales.scale * share, fmt.scale, mode, drawn).clamp(max=fmt.scale_bound)
    folded = Scales(grouping.stored(scale), scales.tensor_scale)
    values, outer = _operand(rounded, folded, fmt, grouping, dtype)
    if not is_zero(moved.shape[-1] - x.shape[axis]):
        values = values[..., : x.shape[axis]]
    return values.movedim(-1, axis), outer


def _eden_share(x: Tensor, restored: Tensor, blocks: int) -> Tensor:
    """⟨x, x⟩/⟨x, x̂⟩ of each group of so many blocks, [..., blocks in all, 1]; 1 where x̂ is 0.

    Summed in float64, so that the order does not show.
    """
    def total(left: Tensor, right: Tensor) -> Tensor:
        product = left.to(torch.float64) * right.to(torch.float64)
        return product.unflatten(-2, (-1, blocks)).sum((-2, -1), True)

    along = total(x, restored)
    share = torch.where(along > 0, total(x, x) / along, 1.0).to(torch.float32)
    return share.expand(*share.shape[:-2], blocks, 1).flatten(-3, -2)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """With zeros after its end, the last axis a multiple."""
    rest = -x.shape[-1] % multiple
    return x if is_zero(rest) else torch.constant_pad_nd(x, [0, rest])


def _block_bits(bits: Tensor, x: Tensor, axis: int, block: int, group: int) -> Tensor:
    """int32 [..., blocks, 1], the axis last, whole groups."""
    moved = bits.to(torch.int32).movedim(axis, -1)
    if tuple(bits.shape) == tuple(x.shape):
        moved = moved[..., ::block]
    return _padded(moved, group // block).unsqueeze(-1)


def check_eden(x: Tensor, fmt: ScaledFormat, axis: int, rounding: Rounding, bits: Tensor,
               group: int, dtype: torch.dtype) -> None:
    """Raise ``FormatError`` for arguments that ``eden_operand`` cannot take."""
    check_input(x, axis, Rounding("nearest"), None)
    _check_dtype(fmt, dtype)
    check_eden_format(fmt, group)
    if not rounding.stochastic:
        raise FormatError("eden rounds block scales stochastically: rounding='stochastic:16'")
    if bits.is_floating_point():
        raise FormatError(f"bits are {bits.dtype}: pass integers, such as torch.int32")
    _check_block_bits(x, axis, bits, fmt.granularity.columns)


def check_eden_format(format: str | ScaledFormat, group: int) -> None:
    """Raise ``FormatError`` for a format, or a size of rotation groups, that EDEN is not for."""
    fmt = parse(format)
    if (fmt.granularity.kind != "block" or not fmt.two_level or fmt.rule != "exact"
            or fmt.scale.name not in ("e4m3", "ue5m3", "ue5m3x")):
        raise FormatError(f"eden rounds block scales, of E4M3 or UE5M3 under a tensor scale; not "
                          f"{str(fmt)!r}: use nvfp4 or fp4_ue5m3")
    block = fmt.granularity.columns
    if group < 1 or group % block:
        raise FormatError(f"eden: groups of {group} are not whole blocks of {block}")


def _check_block_bits(x: Tensor, axis: int, bits: Tensor, block: int) -> None:
    index = normalized_axis(axis, x.ndim)
    shape: list[Any] = list(x.shape)
    shape[index] = (shape[index] + block - 1) // block
    if tuple(bits.shape) not in (tuple(x.shape), tuple(shape)):
        raise FormatError(f"bits have shape {static_shape(bits.shape)}: one number a block, "
                          f"{static_shape(shape)}, or one an element, {static_shape(x.shape)}")
