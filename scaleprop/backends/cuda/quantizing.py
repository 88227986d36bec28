"""Launching the quantize kernels: tiles, outputs, and what no kernel has."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaleprop.backends.cuda.constants import (
    PACKED,
    Element,
    Scaling,
    element_constants,
    scaling_constants,
)
from scaleprop.backends.cuda.devices import FLOAT8, capability_of
from scaleprop.backends.cuda.kernels import groups, random, rows
from scaleprop.backends.cuda.launching import launch, programs
from scaleprop.errors import FormatError
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.packing import packed_size
from scaleprop.formats.rounding import MODES, Rounding
from scaleprop.formats.scaled import ScaledFormat

NEAREST = Rounding("nearest")
NATIVE = {"e4m3": 1, "e5m2": 2}  # the conversion that devices with units for float8 have
ROW, TENSOR, GIVEN = 0, 1, 2  # where the scales of rows come from
ROWS_TILE = 4, 512  # rows and columns that a program holds at a time
_AMAX_TILE, _RANDOM_TILE = (4, 1024), (16, 256)
MOST_ROTATED = 128  # of a tile's columns
ALIGNED = 16  # the most rows that one call of Philox has numbers for, and the least of a tile


def element_of(fmt: ScaledFormat, device: torch.device) -> Element:
    """The constants of the element: whether the device itself converts to it, too.

    Raises:
        FormatError: for elements that no kernel packs.
    """
    found = element_constants(fmt.element)
    if found.bits not in PACKED:
        raise FormatError(f"no kernel packs {found.bits} bits")
    return _converted(found, fmt.element.name, device)


def scaling_of(fmt: ScaledFormat, device: torch.device) -> Scaling:
    """The constants of scales, as ``element_of``."""
    found = scaling_constants(fmt)
    item = None if found.item is None else _converted(found.item, fmt.scale.name, device)
    return found._replace(item=item)


def _converted(item: Element, name: str, device: torch.device) -> Element:
    native = NATIVE.get(name, 0) if capability_of(device) >= FLOAT8 else 0
    return item._replace(native=native)


class Draw(NamedTuple):
    """Where random numbers come from: as ``scaleprop.formats.random.random_bits`` for x's shape.

    seed: 0..2^32-1. step, stream, stream_t (of what is quantized across): int64 of one element.
    first_row: where x begins in the matrix that numbers are drawn for, a multiple of ``ALIGNED``.
    """

    seed: int
    step: Tensor
    stream: Tensor
    stream_t: Tensor
    first_row: int = 0


class Rotation(NamedTuple):
    """x·diag(signs)·H/√block on blocks of what is quantized: ``scaleprop.ops.hadamard``.

    block: 2^m, at most 128. signs: ±1, [block] or [size of the axis]; None: all 1.
    """

    block: int
    signs: Tensor | None = None


def quantize_groups(
    x: Tensor, fmt: ScaledFormat, axes: Collection[int] = (1,), rounding: Rounding = NEAREST,
    bits: Tensor | Draw | None = None, rotation: Rotation | None = None, prescale: float = 1.0,
) -> list[list[Tensor]]:  # fmt: skip
    """For each of ``axes``, 0 or 1, the stored parts of ``x`` [M, K] quantized along it.

    bits: integers shaped as x, or where to draw them; of a stochastic rounding. rotation: of the
    axis, before, in float32; its block divides the axis. prescale: data in units of the element is
    multiplied by it before rounding, as in ``scaleprop.ops.operands.quantize_operand``.

    Raises:
        FormatError: for granularities, elements and rules that no kernel has, and random numbers
            that begin within a call of Philox.
    """
    if fmt.block is None or fmt.zero_point or x.ndim != 2 \
            or any(size & (size - 1) for size in fmt.block):
        raise FormatError(f"{fmt.long_name!r}: quantize_groups takes blocks and tiles of matrices, "
                          "of 2^m by 2^n, without zero points")
    turned = 0 if rotation is None else rotation.block
    if len(axes) > 1 and not at_once(fmt, axes, rounding.stochastic, turned):
        return [quantize_groups(x, fmt, (axis,), rounding, bits, rotation, prescale)[0]
                for axis in axes]
    element, scaling = element_of(fmt, x.device), scaling_of(fmt, x.device)
    r, c = fmt.block
    m, k = x.shape
    amax = torch.zeros(2, dtype=torch.int32, device=x.device) if fmt.two_level else x
    whole, whole_t = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    sides = {axis: _layout(x, *((m, k) if axis else (k, m)), fmt) for axis in axes}
    (data, scales), (data_t, scales_t) = (sides.get(axis, next(iter(sides.values())))
                                          for axis in (1, 0))
    signs, turn = _turn(x, rotation, axes)
    if fmt.two_level:
        _find_amax(x, amax, axes, signs, turn)
    given = bits if isinstance(bits, Tensor) else x
    draw = bits if isinstance(bits, Draw) else Draw(0, amax, amax, amax)
    if draw.first_row % ALIGNED:
        raise FormatError(f"no kernel draws from row {draw.first_row} on: a multiple of {ALIGNED}")
    height, width = tile_of(fmt, axes, turn["H"])
    launch(
        groups.quantize_kernel, (programs(m, height), programs(k, width)),
        x, given, *signs, amax, data, scales, data_t, scales_t, whole, whole_t, draw.seed,
        draw.stream, draw.step, draw.stream_t, draw.first_row, m, k, *x.stride(), *given.stride(),
        data.shape[1], *scales.shape, data_t.shape[1], *scales_t.shape, E=element, S=scaling, R=r,
        C=c, ROWS=height, COLUMNS=width, ALONG=1 in axes, ACROSS=0 in axes, BITS=rounding.bits,
        MODE=MODES.index(rounding.mode), PHILOX=isinstance(bits, Draw), PRESCALE=prescale, **turn,
        num_warps=warps_of(height, width, axes, rounding.stochastic, turn["H"]))
    outer = (whole_t, whole)
    return [[*_typed(*sides[axis], fmt), *([outer[axis]] if fmt.two_level else [])]
            for axis in axes]


def _turn(x: Tensor, rotation: Rotation | None,
          axes: Collection[int]) -> tuple[tuple[Tensor, int], dict[str, Any]]:
    """Signs, how many, and constants of a rotation; x stands in for signs where there is none."""
    if rotation is None:
        return (x, 1), {"H": 0, "FACTOR": 1.0}
    block, signs = rotation
    sizes = [x.shape[axis] for axis in axes]
    if block & (block - 1) or not 2 <= block <= MOST_ROTATED or any(n % block for n in sizes):
        raise FormatError(f"no kernel rotates blocks of {block} of {sizes}: 2^m up to "
                          f"{MOST_ROTATED}, dividing the axis")
    found = torch.ones(block, device=x.device) if signs is None else signs
    if any(len(found) not in (block, n) for n in sizes):
        raise FormatError(f"{len(found)} signs for blocks of {block} of {sizes}")
    return (found, len(found)), {"H": block, "FACTOR": 1.0 / math.sqrt(block)}


def _find_amax(x: Tensor, amax: Tensor, axes: Collection[int], signs: tuple[Tensor, int],
               turn: dict[str, Any]) -> None:
    """amax [2]: of x along and across; where nothing is rotated the first is both."""
    for axis in axes if turn["H"] else (1,):
        lines = x if axis else x.t()
        launch(groups.amax_kernel, (programs(len(lines), _AMAX_TILE[0]),), lines, *signs,
               amax[1 - axis:], *lines.shape, *lines.stride(), **turn, ROWS=_AMAX_TILE[0],
               COLUMNS=_AMAX_TILE[1])


def at_once(fmt: ScaledFormat, axes: Collection[int], stochastic: bool, rotated: int = 0) -> bool:
    """Whether both axes are one launch: tiles of 128 by 128 with random numbers, or rotated, fill
    the registers of a multiprocessor, and more."""
    rows, columns = tile_of(fmt, axes, rotated)
    return rows * columns < 128 * 128 or not (stochastic or rotated)


def tile_of(fmt: ScaledFormat, axes: Collection[int], rotated: int = 0) -> tuple[int, int]:
    """Rows and columns of a program: whole groups, and rotated blocks, along every axis asked
    for."""
    assert fmt.block is not None
    r, c = fmt.block
    long = max(c, rotated)
    return (max(r, long if 0 in axes else 1, 16),
            max(r, *((long, 128) if 1 in axes else (32,))))


def warps_of(rows: int, columns: int, axes: Collection[int], stochastic: bool, rotated: int) -> int:
    """For 32 elements a thread: addresses and masks are then few instructions for each. For 16
    where random numbers, or rotations along both axes, take registers."""
    more = stochastic or (rotated > 0 and len(axes) > 1)
    return min(max(rows * columns // (512 if more else 1024), 2), 32 if more else 16)


def _layout(x: Tensor, m: int, k: int, fmt: ScaledFormat) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a matrix of m rows and k columns."""
    assert fmt.block is not None
    r, c = fmt.block
    groups = -(-k // c)
    data = torch.empty(m, packed_size(groups * c, fmt.bits), dtype=torch.uint8, device=x.device)
    dtype = torch.float32 if fmt.scale.name == "f32" else torch.uint8
    return data, torch.empty(-(-m // r), groups, dtype=dtype, device=x.device)


def _typed(data: Tensor, scales: Tensor, fmt: ScaledFormat) -> list[Tensor]:
    """The same bytes, in the format's dtypes."""
    if fmt.element.storage != torch.uint8:
        data = data.view(fmt.element.storage)
    if fmt.scale.native is not None and scales.dtype == torch.uint8:
        scales = scales.view(fmt.scale.native)
    return [data, scales]


def quantize_rows(
    x: Tensor, fmt: ScaledFormat, scales: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The stored parts of ``x`` [M, K] with one scale a row or a tensor; ``scales`` as given to
    ``scaleprop.quantize``: [scale], or [scale, zero_point].

    Raises:
        FormatError: for granularities, elements and rules that no kernel has.
    """
    element = line_element(x, fmt, "quantize_rows")
    m, k = x.shape
    by_row = fmt.granularity.kind == "row"
    data = torch.empty(m, packed_size(k, fmt.bits), dtype=torch.uint8, device=x.device)
    shape = (m, 1) if by_row else ()
    found = _given(scales, shape, fmt) if scales else [
        torch.empty(shape, dtype=kind, device=x.device) for kind in (torch.float32, torch.uint8)]
    mode = GIVEN if scales else ROW if by_row else TENSOR
    ranges = tensor_ranges(x) if mode == TENSOR else x
    launch(rows.rows_kernel, (programs(m, ROWS_TILE[0]),), x, ranges, data, found[0], found[-1], m,
            k, *x.stride(), data.shape[1], int(by_row), E=element, S=scaling_constants(fmt),
            LEVELS=levels_of(fmt), MODE=mode, ROWS=ROWS_TILE[0], COLUMNS=ROWS_TILE[1])
    if not fmt.zero_point and fmt.element.storage != torch.uint8:
        data = data.view(fmt.element.storage)
    return [data, *found[: fmt.parts_count - 1]]


def line_element(x: Tensor, fmt: ScaledFormat, taker: str) -> Element:
    """The element of a format with a float32 scale of each row, or one of a matrix.

    Raises:
        FormatError: for others, naming who does not take them.
    """
    if fmt.granularity.kind not in ("row", "tensor") or x.ndim != 2 or fmt.scale.name != "f32" \
            or fmt.two_level:
        raise FormatError(f"{fmt.long_name!r}: {taker} takes float32 scales of rows, or one of a "
                          "matrix, of one level")
    return element_of(fmt, x.device)


def tensor_ranges(x: Tensor) -> Tensor:
    """int32 [3]: bits of the largest magnitude; least and largest value, ordered as floats are."""
    ranges = torch.zeros(3, dtype=torch.int32, device=x.device)
    launch(rows.ranges_kernel, (programs(len(x), ROWS_TILE[0]),), x, ranges, *x.shape, *x.stride(),
           ROWS=ROWS_TILE[0], COLUMNS=ROWS_TILE[1])
    return ranges


def _given(scales: Sequence[Tensor], shape: tuple[int, ...], fmt: ScaledFormat) -> list[Tensor]:
    """New tensors of the parts' shapes and dtypes; a single number may have any axes."""
    count = math.prod(shape)
    if len(scales) != fmt.parts_count - 1 or any(part.numel() != count for part in scales):
        raise FormatError(f"{fmt.long_name!r} takes a scale{', a zero point' * fmt.zero_point} of "
                          f"{list(shape)}, not {[list(part.shape) for part in scales]}")
    kinds = (torch.float32, torch.uint8)
    return [torch.empty(shape, dtype=kind, device=part.device).copy_(part.reshape(shape))
            for part, kind in zip(scales, kinds, strict=False)]


def levels_of(fmt: ScaledFormat) -> int:
    """The largest code of a format with zero points; 0 of others."""
    return fmt.element.levels if fmt.zero_point and isinstance(fmt.element, IntegerElement) else 0


def random_bits(out: Tensor, seed: int, stream: Tensor, step: Tensor, bits: int) -> Tensor:
    """``out`` int32 [rows, columns], filled with what ``scaleprop.formats.random.random_bits``
    gives for its shape. stream, step: int64 of one element, on the device."""
    height, width = out.shape
    launch(random.random_kernel, (programs(height, _RANDOM_TILE[0]),
                                   programs(width, _RANDOM_TILE[1])), out, height, width, seed,
            stream, step, BITS=bits, ROWS=_RANDOM_TILE[0], COLUMNS=_RANDOM_TILE[1])
    return out
