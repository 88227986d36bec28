"""The kernels that ``benchmarks.kernels_static`` compiles, in the formats and tiles they run in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from scaleprop.backends.cuda.constants import (
    Element,
    Scaling,
    element_constants,
    scaling_constants,
    stored_constants,
)
from scaleprop.formats import parse
from scaleprop.formats.scaled import ScaledFormat

BLOCKS = ("mxfp8", "mxfp6", "mxfp4", "nvfp4", "e2m1[1x16]*ue5m3*f32", "e4m3[1x128]*f32",
          "e4m3[128x128]*f32")  # fmt: skip
ROWS = ("e4m3[row]*f32", "int8[row]*f32", "int8[tensor]*f32+zp")
LINES = ("e4m3[row]*f32", "int8[row]*f32", "int4[row]*f32", "fp8")
FUSED = ("mxfp8", "mxfp4", "nvfp4", "e4m3[1x128]*f32", "e4m3[row]*f32", "int8[row]*f32+zp")
CACHES = ("e4m3[row]*f32", "int4[1x128]*f32+zp", "int4[1x32]*f16", "mxfp8", "mxfp4", None)
ROTATED = (("mxfp4", 32), ("nvfp4", 16), ("nvfp4", 128))
READ = ("mxfp8", "mxfp6", "nvfp4", "int4[1x128]*f32+zp")
WEIGHTS = ("int4", "int4[1x128]*f32+zp", "mxfp4", "nvfp4", "e4m3[row]*f32", "mxfp6")
PAIRS = (
    ("int8[row]*f32", "int8[row]*f32"), ("int8[row]*f32+zp", "int8[row]*f32"),
    ("int8[row]*f32", "int4[1x128]*f32"), ("e4m3[row]*f32", "e4m3[row]*f32"),
    ("e4m3[1x128]*f32", "e4m3[128x128]*f32"), ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"),
    ("nvfp4", "nvfp4"), ("mxfp6", "mxfp6"), ("e4m3[row]*f32", "int4[1x128]*f32"),
)  # fmt: skip
ROWS_OF_X = (1, 16, 64, 1024)
FLOAT8_TARGETS = (89, 90, 100, 120)
WORDS = ("int4", "int4[1x128]*f32+zp", "mxfp4", "nvfp4", "mxfp8", "e4m3[row]*f32",
         "e4m3[128x128]*f32")  # fmt: skip
SCALED = (("mxfp4", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp8_e5m2", "mxfp8"))
POINTERS = (
    "x", "bits", "signs", "amax", "data", "scales", "data_t", "scales_t", "whole", "whole_t",
    "stream", "step", "stream_t", "ranges", "most", "most_t", "zeros", "outer", "out", "keys",
    "key_zeros", "values", "value_zeros",
    "x_scales", "x_zeros", "x_outer", "w", "w_scales", "w_zeros", "w_outer", "sums", "bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel with its constants. pointers: type of each pointer that is not one of bytes.
    targets: that it runs on; (): any. instruction: that it is for, in part."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    pointers: Mapping[str, str]
    warps: int = 4
    stages: int = 3
    targets: tuple[int, ...] = ()
    instruction: str = ""


def builds() -> Iterator[Build]:
    """All kernels, of bfloat16 in rows."""
    yield from _quantizing()
    yield from _lines()
    yield from _attention()
    yield from _fused()
    yield from _reading()
    yield from _products()
    yield from _scaled()
    yield from _words()


def _quantizing() -> Iterator[Build]:
    """Along both axes where they can."""
    from scaleprop.backends.cuda import quantizing
    from scaleprop.backends.cuda.kernels import rows

    for name in BLOCKS:
        fmt = parse(name)
        for mode in ("nearest", "stochastic"):
            if mode == "nearest" or quantizing.at_once(fmt, (1, 0), True):
                yield _groups(f"{name} both ways, {mode}", fmt, (1, 0), mode)
            else:
                yield _groups(f"{name} across, {mode}", fmt, (0,), mode)
                yield _groups(f"{name} along rows, {mode}", fmt, (1,), mode)
        yield _groups(f"{name} along rows", fmt, (1,))
    for name, block in ROTATED:
        fmt = parse(name)
        ways = {"along rows": (1,), "across": (0,)}
        if quantizing.at_once(fmt, (1, 0), False, block):
            ways["both ways"] = (1, 0)
        for way, axes in ways.items():
            yield _groups(f"{name} {way}, rotated by {block}", fmt, axes, block=block)
    for name in ROWS:
        fmt = parse(name)
        yield Build(name, rows.rows_kernel, {
            "E": _element(fmt), "S": _scaling(fmt),
            "LEVELS": quantizing.levels_of(fmt),
            "MODE": quantizing.TENSOR if fmt.granularity.kind == "tensor" else quantizing.ROW,
            "ROWS": quantizing.ROWS_TILE[0], "COLUMNS": quantizing.ROWS_TILE[1]},
            {"x": "*bf16", "ranges": "*i32", "scales": "*fp32"})


def _groups(name: str, fmt: ScaledFormat, axes: tuple[int, ...], mode: str = "nearest",
            block: int = 0) -> Build:
    from scaleprop.backends.cuda import quantizing
    from scaleprop.backends.cuda.kernels import groups

    assert fmt.block is not None
    tile = quantizing.tile_of(fmt, axes, block)
    scales = "*fp32" if fmt.scale.name == "f32" else "*u8"
    return Build(name, groups.quantize_kernel, {
        "E": _element(fmt), "S": _scaling(fmt), "R": fmt.block[0],
        "C": fmt.block[1], "ROWS": tile[0], "COLUMNS": tile[1], "ALONG": 1 in axes,
        "ACROSS": 0 in axes, "BITS": 8, "MODE": int(mode == "stochastic"),
        "PHILOX": mode == "stochastic", "H": block, "FACTOR": max(block, 1) ** -0.5,
    }, {"x": "*bf16", "bits": "*bf16", "signs": "*fp32", "amax": "*i32", "whole": "*fp32",
        "whole_t": "*fp32", **dict.fromkeys(("stream", "step", "stream_t"), "*i64"),
        **dict.fromkeys(("scales", "scales_t"), scales)},
        quantizing.warps_of(*tile, axes, mode == "stochastic", block))


def _lines() -> Iterator[Build]:
    """Ranges and codes of rows and columns; of the tensor, by an amax that is given, too."""
    from scaleprop.backends.cuda import lines
    from scaleprop.backends.cuda.kernels import lines as kernels

    pointers = {"x": "*bf16", **dict.fromkeys(("most", "most_t"), "*i32"),
                **dict.fromkeys(("scales", "scales_t"), "*fp32")}
    for way, axes in (("both ways", (1, 0)), ("across", (0,))):
        yield Build(f"lines, ranges {way}", kernels.line_ranges_kernel,
                    {"ALONG": 1 in axes, "ACROSS": 0 in axes, **lines.TILE}, pointers,
                    lines.WARPS)
        for name in LINES:
            fmt = parse(name)
            for given in (False, True) if fmt.granularity.kind == "tensor" else (False,):
                yield Build(f"lines, {name} {way}" + ", amax given" * given, kernels.lines_kernel,
                            {"E": _element(fmt),
                             **lines.constants_of(fmt, axes, given)}, pointers, lines.WARPS)


def _attention() -> Iterator[Build]:
    """Eight heads of 128 that share a head of the cache: one new query of each, and sixteen."""
    from scaleprop.backends.cuda import attention
    from scaleprop.backends.cuda.kernels import attention as kernels

    floats = {"most": "*fp32", "total": "*fp32", "partial": "*fp32"}
    for name in CACHES:
        fmt = None if name is None else parse(name)
        stored = None if fmt is None else stored_constants(fmt)
        scales = "*u8" if fmt is None else _scales(fmt)
        pointers = {"q": "*bf16", "lengths": "*i32", **floats, **dict.fromkeys(
            ("key_scales", "value_scales", "key_outer", "value_outer"), scales)}
        if stored is None:
            pointers |= {"keys": "*bf16", "values": "*bf16"}
        for count, of in ((1, "bf16"), (16, "bf16"), (1, "fp32")):
            rows, columns, warps = attention.tile_of(8 * count, 128, of == "bf16")
            yield Build(f"attention, {count} of {of} over {name or 'bf16'}",
                        kernels.attention_kernel, {
                "K": stored, "V": stored, "HEADS": 8, "QUERIES": 8 * count, "T": count,
                "SCALE": 128**-0.5, "CAP": 0.0, "WINDOW": 0, "SPLITS": 16, "ROWS": rows,
                "COLUMNS": columns, "DEPTH": 128, "EXACT": of == "fp32"},
                pointers | {"q": f"*{of}"}, warps)  # fmt: skip
    yield Build("attention, shares together", kernels.combine_kernel,
                {"SPLITS": 32, "PADDED": 32, "DEPTH": 128}, floats | {"out": "*i16"})


def _fused() -> Iterator[Build]:
    """A norm with gain, and SwiGLU, of rows of 8192, all rounded to bfloat16 between."""
    from scaleprop.backends.cuda import fusing, quantizing
    from scaleprop.backends.cuda.kernels.fused import fused_kernel

    for name in FUSED:
        fmt = parse(name)
        rows, columns = fusing.tile_of(fmt, 8192)
        scales = "*fp32" if fmt.scale.name == "f32" else "*u8"
        pointers = {**dict.fromkeys(("x", "up", "gain", "bias", "result"), "*bf16"),
                    "ranges": "*i32", "whole": "*fp32", "scales": scales}
        for kind, norm, function in (("rms norm", 1, ""), ("layer norm", 2, ""),
                                     ("SwiGLU", 0, "silu")):
            for step in (fusing.RANGES,) * fmt.two_level + (
                    fusing.GROUPS if fmt.block else fusing.ROW,):
                yield Build(f"{kind} to {name}" + ", range" * (step == fusing.RANGES),
                            fused_kernel, {
                    "E": _element(fmt), "S": _scaling(fmt),
                    "C": fmt.block[1] if fmt.block else 1, "LEVELS": quantizing.levels_of(fmt),
                    "MODE": step, "NORM": norm, "FUNCTION": function, "GATED": not norm,
                    "GAIN": norm > 0, "BIAS": norm == 2, "EPS": 1e-5, "BETWEEN": 2, "WITHIN": 2,
                    "KEEP": False, "ROWS": rows, "COLUMNS": columns}, pointers)  # fmt: skip


def _reading() -> Iterator[Build]:
    """Dequantizing to bfloat16."""
    from scaleprop.backends.cuda.dequantizing import COLUMNS as WIDTH
    from scaleprop.backends.cuda.dequantizing import ROWS as HEIGHT
    from scaleprop.backends.cuda.kernels.dequantizing import dequantize_kernel

    for name in READ:
        fmt = parse(name)
        stored = stored_constants(fmt)
        yield Build(f"dequantize {name}", dequantize_kernel,
                    {"F": stored, "ROWS": HEIGHT, "COLUMNS": max(WIDTH, stored.columns)},
                    {"scales": _scales(fmt), "outer": "*fp32", "out": "*i16"})


def _products() -> Iterator[Build]:
    """The first tile of each way and number of rows; x and results are of bfloat16."""
    cases: list[tuple[ScaledFormat | torch.dtype, str]] = [
        *((torch.bfloat16, name) for name in WEIGHTS), (torch.float32, "int4"),
        (torch.float32, "mxfp4"), (torch.float16, "int4"), (torch.float16, "nvfp4"),
        *((parse(x), w) for x, w in PAIRS)]
    for x, name in cases:
        for bucket in ROWS_OF_X:
            yield _product(x, parse(name), bucket)


def _product(x: ScaledFormat | torch.dtype, w: ScaledFormat, bucket: int) -> Build:
    from scaleprop.backends.cuda import products
    from scaleprop.backends.cuda.kernels.products import product_kernel

    floats = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    pointers = {"out": "*i16", "bias": "*bf16", "sums": "*i32",
                "w_scales": _scales(w), "w_outer": "*fp32", "x_outer": "*fp32"}
    if isinstance(x, ScaledFormat):
        pointers |= {"x": "*u8", "x_scales": _scales(x)}
    else:
        pointers |= {"x": f"*{floats[x]}"}
    way = products.way_of(x, w, 4096, fp8=True)
    config = products.fitted(bucket, way)[0]
    tile = "×".join(str(config.kwargs[side]) for side in ("ROWS", "COLUMNS", "DEPTH"))
    title = floats[x] if isinstance(x, torch.dtype) else str(x)
    return Build(f"{title} × {w}, {bucket} rows, tile {tile}", product_kernel,
                 {**way.constants, "BIAS": True, "SPLITS": 1, **config.kwargs}, pointers,
                 config.num_warps, config.num_stages,
                 FLOAT8_TARGETS if way.dot == torch.float8_e4m3fn else ())


def _scaled() -> Iterator[Build]:
    """The first tile of each pair of MX blocks, on targets that have units for it."""
    from scaleprop.backends.cuda import scaled
    from scaleprop.backends.cuda.kernels.scaled import scaled_kernel

    for x, w in SCALED:
        formats = parse(x), parse(w)
        for target in (100, 120):
            major, minor = divmod(target, 10)
            if not scaled.takes(*formats, (major, minor)):
                continue
            for bucket in (16, 64, 1024):
                way = scaled.way_of(*formats, bucket, (major, minor))
                config = next(scaled.tiles_for(way, bucket))
                tile = "×".join(str(config.kwargs[side]) for side in ("ROWS", "COLUMNS", "DEPTH"))
                yield Build(f"blocks {x} × {w} on {major}.x, {bucket} rows, tile {tile}",
                            scaled_kernel,
                            {**way.constants, "BIAS": True, "SPLITS": 1, **config.kwargs},
                            {"out": "*i16", "bias": "*bf16"}, config.num_warps, config.num_stages,
                            (target,), "block_scale")


def _words() -> Iterator[Build]:
    """The first tile of few rows of bfloat16, of each format that is decoded in pairs."""
    from scaleprop.backends.cuda import products, words
    from scaleprop.backends.cuda.kernels.words import words_kernel

    for name in WORDS:
        fmt = parse(name)
        stored = stored_constants(fmt)
        at = products.way_of(torch.bfloat16, fmt, 4096).w_at
        for bucket in (1, 16, 64):
            config = words.fitted(bucket, stored, at)[0]
            tile = "×".join(str(config.kwargs[side]) for side in ("ROWS", "COLUMNS", "DEPTH"))
            yield Build(f"pairs, bf16 × {name}, {bucket} rows, tile {tile}", words_kernel, {
                "W": stored, "P": words.pairs_of(stored), "W_AT": at, "NATIVE": True,
                "EVEN": True, "BIAS": True, "SPLITS": 1, **config.kwargs},
                {"w": "*i32", "w_scales": _scales(fmt), "w_outer": "*fp32", "bias": "*bf16",
                 "out": "*i16", "x": "*bf16"}, config.num_warps, config.num_stages)


def _element(fmt: ScaledFormat) -> Element:
    """With the device's own conversion, where there is one."""
    from scaleprop.backends.cuda.quantizing import NATIVE

    return element_constants(fmt.element)._replace(native=NATIVE.get(fmt.element.name, 0))


def _scaling(fmt: ScaledFormat) -> Scaling:
    from scaleprop.backends.cuda.quantizing import NATIVE

    found = scaling_constants(fmt)
    native = NATIVE.get(fmt.scale.name, 0)
    return found._replace(item=None if found.item is None else found.item._replace(native=native))


def _scales(fmt: ScaledFormat) -> str:
    return {"f32": "*fp32", "f16": "*fp16", "bf16": "*i16"}.get(fmt.scale.name, "*u8")
