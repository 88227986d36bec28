"""Launching products: what is multiplied in which type, where scales come in, which tiles."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from scaleprop.backends.cuda.constants import Stored, element_constants, stored_constants
from scaleprop.backends.cuda.kernels import products as kernels
from scaleprop.backends.cuda.launching import Parts, as_bytes, launch, matrix_of, programs
from scaleprop.errors import FormatError
from scaleprop.formats.elements import FloatElement
from scaleprop.formats.elements import element as named_element
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import codes_of
from scaleprop.ops.operands import exact_dtype

PLAIN, AFTER, FOLDED, PART = range(4)
BYTES_DEPTH = 1 << 16  # of sums of bytes that int32 holds, zero points included
E4M3, E5M2 = (element_constants(named_element(name)) for name in ("e4m3", "e5m2"))
_LEAST_DEPTH = 8  # of a product of float32
SUM_TILE = 16, 128
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
         torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv}  # fmt: skip


class Way(NamedTuple):
    """How a product is computed: the operands in constants, where their scales come in, and the
    type that is multiplied. x: None where it is not quantized. least, most: of K in a step."""

    x: Stored | None
    w: Stored
    x_at: int
    w_at: int
    dot: torch.dtype
    least: int
    most: int

    @property
    def constants(self) -> dict[str, Any]:
        """As kernels take them; the interpreter multiplies no bfloat16, and its float32 holds what
        that does."""
        dot = torch.float32 if interpreted() and self.dot == torch.bfloat16 else self.dot
        return {"X": self.x, "W": self.w, "X_AT": self.x_at, "W_AT": self.w_at, "DOT": _DOTS[dot]}


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


@functools.cache
def way_of(x: ScaledFormat | torch.dtype, w: ScaledFormat, k: int, fp8: bool = False) -> Way:
    """The way for operands of these formats; ``x`` a dtype where it is not quantized.

    fp8: multiply float8 as float8 (sums of a step are less exact than float32's) where both
    operands' values are numbers of it.

    Raises:
        FormatError: for formats that no kernel reads, or groups that are no powers of two.
    """
    stored = stored_constants(w)
    if isinstance(x, torch.dtype):
        if x not in _FLOATS:
            raise FormatError(f"no kernel multiplies {x}")
        return _placed(None, stored, x, PLAIN, _place(w, stored, x))
    operand = stored_constants(x)
    if _bytes(operand, stored, k):
        return _placed(operand, stored, torch.int8, *map(_grouped, (operand, stored)))
    if fp8 and all(_as_float8(item) for item in (operand, stored)):
        return _placed(operand, stored, torch.float8_e4m3fn, *map(_grouped, (operand, stored)))
    return _placed(operand, stored, torch.bfloat16, _place(x, operand, torch.bfloat16),
                   _place(w, stored, torch.bfloat16))


def _placed(x: Stored | None, w: Stored, dot: torch.dtype, x_at: int, w_at: int) -> Way:
    sizes = [item.columns for item, at in ((x, x_at), (w, w_at)) if item is not None and at == PART]
    if any(item is not None and item.columns & (item.columns - 1) for item in (x, w)):
        raise FormatError("kernels multiply groups of 2^n columns")
    least = 32 if dot.itemsize == 1 else 16
    most = min([*sizes, 256])
    if most < _LEAST_DEPTH:
        raise FormatError(f"kernels multiply groups of at least {_LEAST_DEPTH} columns")
    if most < least:
        return Way(x, w, x_at, w_at, torch.float32, most, most)
    return Way(x, w, x_at, w_at, dot, least, most)


def _bytes(x: Stored, w: Stored, k: int) -> bool:
    """Whether both are integers, summed without overflow. Zero points: those of rows of x."""
    integers = x.element.integer and w.element.integer and k <= BYTES_DEPTH and not w.zero
    wide = all(item.columns == 0 or item.columns >= 32 for item in (x, w))
    return bool(integers and wide and not (x.zero and (x.columns or w.columns)))


def _as_float8(item: Stored) -> bool:
    """Whether the element is E4M3 or E5M2, and parts that share a scale are not short."""
    return item.element in (E4M3, E5M2) and (item.columns == 0 or item.columns >= 32)


def _grouped(item: Stored) -> int:
    return PART if item.columns else AFTER


def _place(fmt: ScaledFormat, item: Stored, dot: torch.dtype) -> int:
    """Where scales of a group come in: in values, where ``dot`` holds the products."""
    if not item.columns:
        return AFTER
    if fmt.zero_point or (dot == torch.float16 and not _in_float16(fmt)):
        return PART
    exact = dot == torch.float32 or exact_dtype(fmt) == torch.bfloat16
    return FOLDED if exact else PART


def _in_float16(fmt: ScaledFormat) -> bool:
    return (isinstance(fmt.element, FloatElement) and fmt.scale.name == "e4m3"
            and fmt.element.max * fmt.scale.max < torch.finfo(torch.float16).max)


# ------------------------------------------------------------------ tiles


def bucket_of(m: int) -> int:
    """Rows rounded up to a power of two, at most 4096: what tiles are chosen for."""
    return min(1 << max(m - 1, 0).bit_length(), 4096)


def tiles_for(bucket: int) -> Iterator[triton.Config]:
    """Tiles to try for so many rows; the first is taken where nothing is tried."""
    if bucket == 1:
        for columns, depth, warps in ((16, 256, 4), (32, 256, 4), (64, 128, 4), (16, 128, 2)):
            yield config_of(1, columns, depth, warps, 3)
    if bucket <= 64:
        rows = max(bucket, 16)
        first = 128 if rows < 64 else 64  # what fits registers, whatever is decoded
        for columns, depth, warps in ((64, first, 4), (32, 256, 4), (128, 128, 4), (128, 64, 4)):
            yield config_of(rows, columns, depth, warps, 4)
    else:
        for rows, columns, depth, warps in ((64, 128, 64, 4), (128, 128, 64, 8), (128, 64, 64, 4),
                                            (128, 256, 64, 8), (128, 128, 128, 8)):
            yield config_of(rows, columns, depth, warps, 3)


def config_of(rows: int, columns: int, depth: int, warps: int, stages: int) -> triton.Config:
    """One tile to try."""
    return triton.Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": 8},
                         num_warps=warps, num_stages=stages)


def fitted(bucket: int, way: Way) -> list[triton.Config]:
    """``tiles_for``, with steps that the way can take; those of float32, whose factors are in
    registers besides the sums, a quarter as large."""
    found: dict[str, triton.Config] = {}
    for config in tiles_for(bucket):
        rows, columns, depth = (config.kwargs[side] for side in ("ROWS", "COLUMNS", "DEPTH"))
        if way.dot == torch.float32:
            rows, columns, depth = min(rows, 32), min(columns, 32), min(depth, 32)
        depth = min(max(depth, way.least), way.most)
        found.setdefault(str(each := config_of(rows, columns, depth, config.num_warps,
                                             config.num_stages)), each)
    return list(found.values())


@functools.cache
def columns_of(bucket: int, way: Way) -> int:
    """Of the first tile."""
    return fitted(bucket, way)[0].kwargs["COLUMNS"]


def splits_for(m: int, n: int, k: int, columns: int, device: torch.device) -> int:
    """How many ranges of K keep every multiprocessor busy, of tiles of so many columns; a function
    of sizes alone."""
    if device.type != "cuda" or m > 64:
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-2 * units // programs(n, columns))
    return max(1, min(wanted, k // 512, 16))


# ------------------------------------------------------------------ launches


def column_sums(parts: Sequence[Tensor], fmt: ScaledFormat, k: int) -> Tensor:
    """int32 [N]: sums of codes along K, which zero points of x are multiplied with."""
    return codes_of(parts[0], fmt, k).to(torch.int32).sum(1, dtype=torch.int32)


def multiply(
    x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None, x_format: ScaledFormat | None,
    w_format: ScaledFormat, k: int, dtype: torch.dtype = torch.float32,
    sums: Tensor | None = None, splits: int | None = None, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias[n]), in ``dtype``: ``scaleprop::scaled_mm``.

    x: [one float tensor] where ``x_format`` is None, which is then multiplied in its own dtype.
    sums: ``column_sums`` of w, where they are known. splits: of K; None: for the device.
    Sums of bytes are exact, others float32's; then each of scales and bias is rounded once.

    Raises:
        FormatError: for formats that no kernel multiplies.
    """
    way = way_of(x_format or x[0].dtype, w_format, k, fp8)
    left = plain(x[0], k) if x_format is None else Parts.of(x, x_format)
    right = Parts.of(w, w_format)
    m, n = left.data.shape[0], right.data.shape[0]
    if way.x is not None and way.dot == torch.int8 and way.x.zero and sums is None:
        sums = column_sums(w, w_format, k)
    out = torch.empty(m, n, dtype=dtype, device=left.data.device)
    count = (splits_for(m, n, k, columns_of(bucket_of(m), way), out.device) if splits is None
             else splits)
    final = as_bytes(out)
    target = final if count == 1 else torch.empty(
        count, m, n, device=out.device,
        dtype=torch.int32 if way.dot == torch.int8 and PART not in (way.x_at, way.w_at)
        else torch.float32)  # fmt: skip
    after = (left.scales, left.zeros, left.outer, right.scales, right.outer)
    added = (right.data if sums is None else sums.contiguous(),
             right.data if bias is None else bias.contiguous())
    _run(way, left, right, added, target, (m, n, k), count, bias is not None)
    if count > 1:
        launch(kernels.sum_kernel, (programs(m, SUM_TILE[0]), programs(n, SUM_TILE[1])), target,
               *after, *added, final, m, n, **way.constants, BIAS=bias is not None, SPLITS=count,
               ROWS=SUM_TILE[0], COLUMNS=SUM_TILE[1])
    return out.reshape(*x[0].shape[:-1], n)


def plain(x: Tensor, k: int) -> Parts:
    data = matrix_of(x)
    if data.shape[1] != k:
        raise FormatError(f"x is {list(x.shape)}, of which no {k} numbers are summed")
    data = data if data.stride(-1) == 1 else data.contiguous()
    return Parts(data, data, data, data)


def _run(
    way: Way, left: Parts, right: Parts, added: tuple[Tensor, Tensor], target: Tensor,
    sizes: tuple[int, int, int], count: int, bias: bool,
) -> None:  # fmt: skip
    m, n, k = sizes

    def grid(meta: Mapping[str, Any]) -> tuple[int, int]:
        return programs(m, meta["ROWS"]) * programs(n, meta["COLUMNS"]), count

    fixed = interpreted() or torch.are_deterministic_algorithms_enabled()
    launch(kernel_of(bucket_of(m), way, fixed), grid, *left, *right, *added, target, m, n, k,
           left.data.stride(0), _width(left, way.x), right.data.stride(0), _width(right, way.w),
           key_of(bucket_of(m), way), **way.constants, BIAS=bias, SPLITS=count)


@functools.cache
def key_of(*choices: Any) -> int:
    """A number that stands for them, the same in every process."""
    return zlib.crc32(str(choices).encode()) >> 1


def _width(parts: Parts, stored: Stored | None) -> int:
    return parts.scales.shape[-1] if stored is not None and stored.columns else 1


@functools.cache
def kernel_of(bucket: int, way: Way, fixed: bool) -> Any:
    """The kernel, tuned by use for so many rows: its choices are kept on disk, by Triton.
    fixed: nothing is tried, so that results are the same in every run."""
    configs = fitted(bucket, way)
    return triton.autotune(configs[:1] if fixed else configs, cache_results=True,
                           key=["N", "K", "SPLITS", "BIAS", "key"])(kernels.product_kernel)
