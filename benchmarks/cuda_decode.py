"""Decoding on a CUDA device: few rows times quantized weights, attention over a quantized cache.

    python -m benchmarks.cuda_decode [--only int4] [--smoke]

Weights alone, x in bfloat16 with M = 1 … 16 rows: × cuBLAS in BF16, and the bytes of codes, scales,
x and y that moved in a second, as a share of what a copy moves. Every call reads a weight of its
own, of as many as the L2 cache cannot hold together. torchao: its INT4 weights, groups of 128, in
the first of its packings that runs here. Attention: one new query of each of 8 sequences, 32 heads
that share 8 of the cache, 128 wide, 8192 positions; beside SDPA over keys and values in BF16.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cuda_harness import Row, Script, main
from benchmarks.cuda_timing import COPY, FLUSHED, Bench, Build, Call, Skip, rotating, wrong
from scaleprop.backends.cuda import operators, words
from scaleprop.backends.cuda.cache import KVCache
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts

SHAPES = ((8192, 8192), (4096, 14336))  # outputs × inputs
COUNTS = (1, 2, 4, 8, 16)
FORMATS = {"INT4": "int4[1x128]*f32", "MXFP4": "mxfp4", "NVFP4": "nvfp4", "FP8": "e4m3[row]*f32"}
HELD = ("INT4", "MXFP4")
FASTER, LEAST = 3.0, 0.75
BF16, SHARE, TORCHAO = "× BF16", "share of copy", "× torchao int4"
CACHES = ("e4m3[row]*f32", "int8[row]*f32", "int4[1x32]*f32+zp", "mxfp8", "bf16")
CACHE = 8, 8, 8192, 128  # sequences, heads, positions, width
HEADS = 32
PACKINGS = ("tile_packed_to_4d", "plain", "preshuffled")
_CALLS = 8


def rows(small: bool) -> list[Row]:
    """Weights by shape, format and rows; caches."""
    shapes = ((64, 256),) if small else SHAPES
    counts = (1, 16) if small else COUNTS
    weights = [
        Row(name=f"{name} weights, {n}×{k}, M = {m}", seconds=90,
            run=lambda bench, name=name, m=m, n=n, k=k: weight(bench, name, m, n, k),
            bounds={BF16: FASTER, SHARE: LEAST, TORCHAO: 1.0} if name in HELD else {})
        for name in FORMATS for n, k in shapes for m in counts]
    return [*weights, *(Row(name=f"attention over {name}",
                            run=lambda bench, name=name: attention(bench, name))
                        for name in CACHES)]


# ------------------------------------------------------------------ weights


def weight(bench: Bench, name: str, m: int, n: int, k: int) -> dict[str, Any]:
    """One product."""
    fmt = parse(FORMATS[name])
    x = torch.randn(m, k, device=bench.device).to(torch.bfloat16)
    first = torch.randn(n, k, device=bench.device).to(torch.bfloat16)
    parts = quantize_parts(first, fmt)
    size = sum(part.nbytes for part in parts)
    plain = words.takes(fmt, k) and words.is_plain(parts, fmt, k)

    def ours() -> Call:
        return rotating([lambda each=each: operators.multiply(
            [x], each, None, None, "f32", str(fmt), k, torch.bfloat16, plain)
            for each in _copies(parts, bench)])

    def bf16() -> Call:
        return rotating([lambda each=each: functional.linear(x, each[0])
                         for each in _copies([first], bench)])

    def torchao() -> Call:
        if name not in HELD:
            raise Skip("torchao's INT4 is beside the formats of 4 bits")
        held = torchao_int4(first, x)
        return rotating([lambda each=each: functional.linear(x, each) for each in [
            held, *(torchao_int4(first, x) for _ in range(_count(size, bench) - 1))]])

    copy, copied = bench.copying()
    found = bench.compare({"ours": ours, "BF16": bf16, "torchao": torchao, COPY: copy},
                          ("torchao",), calls=1 if bench.small else _CALLS)
    exact = dequantize_parts(parts, fmt, first.shape)
    error = wrong(found.results["ours"], x.float() @ exact.t())
    if not error < 0.01:
        raise ValueError(f"the product is off by {error:.2g}")
    moved = size + x.nbytes + 2 * m * n
    return found.result({
        BF16: found.faster("ours", "BF16"), SHARE: found.share("ours", moved, COPY, copied),
        TORCHAO: found.faster("ours", "torchao"), "GB/s": found.rate("ours", moved / 1e9),
        "BF16 share of copy": found.share("BF16", first.nbytes, COPY, copied),
        "error": [error] * 3})


def _count(size: int, bench: Bench) -> int:
    """As many as the cache cannot hold; fewer than that are read again too soon."""
    return 1 if bench.small else max(math.ceil(FLUSHED / size), 2)


def _copies(parts: list[Tensor], bench: Bench) -> list[list[Tensor]]:
    count = _count(sum(part.nbytes for part in parts), bench)
    return [parts, *([part.clone() for part in parts] for _ in range(count - 1))]


def torchao_int4(weight: Tensor, x: Tensor) -> Any:
    """torchao's weight in the first packing whose product runs.

    Raises:
        Skip: where none does.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError as error:
        raise Skip(f"torchao: {error}") from error
    if not x.is_cuda:
        raise Skip("torchao's INT4 products need a device")
    why: list[str] = []
    for packing in PACKINGS:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device,
                                dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        try:
            quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format=packing))
            functional.linear(x, layer.weight)
        except Exception as error:  # noqa: BLE001  of packings, each may lack its kernels
            why.append(f"{packing}: {type(error).__name__} {str(error)[:60]}")
        else:
            return layer.weight
    raise Skip("torchao: " + "; ".join(why))


# ------------------------------------------------------------------ attention


def attention(bench: Bench, name: str) -> dict[str, Any]:
    """A step of decoding over a full cache."""
    batch, groups, length, depth = (2, 2, 64, 32) if bench.small else CACHE
    heads = 4 if bench.small else HEADS
    fmt = None if name == "bf16" else parse(name)
    keys, values = (torch.randn(batch, groups, length, depth, device=bench.device).to(
        torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, heads, 1, depth, device=bench.device).to(torch.bfloat16)
    caches = [_filled(keys, values, fmt, bench) for _ in range(1 if bench.small else 2)]
    size = sum(part.nbytes for part in (*caches[0].keys, *caches[0].values))

    def sdpa() -> Call:
        both = [(keys, values), (keys.clone(), values.clone())]
        return rotating([lambda k=k, v=v: functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=True) for k, v in both])

    copy, copied = bench.copying()
    builds: dict[str, Build] = {
        "ours": lambda: rotating([lambda cache=cache: cache.attend(q) for cache in caches]),
        "SDPA": sdpa, COPY: copy,
        "ours, replayed": lambda: bench.graph(lambda: caches[0].attend(q))}
    found = bench.compare(builds, ("SDPA", "ours, replayed"), calls=1 if bench.small else 2)
    exact = [each.float() if fmt is None else dequantize_parts(quantize_parts(each, fmt), fmt,
                                                              each.shape)
             for each in (keys, values)]  # fmt: skip
    want = functional.scaled_dot_product_attention(q.float(), *exact, enable_gqa=True)
    error = wrong(found.results["ours"], want)
    if not error < 0.02:
        raise ValueError(f"attention is off by {error:.2g}")
    plain = keys.nbytes + values.nbytes
    return found.result({
        "× SDPA": found.faster("ours", "SDPA"), SHARE: found.share("ours", size, COPY, copied),
        "GB/s": found.rate("ours", size / 1e9),
        "SDPA GB/s": found.rate("SDPA", plain / 1e9) if "SDPA" in found.seconds else None,
        "× replayed": found.faster("ours", "ours, replayed"), "error": [error] * 3})


def _filled(keys: Tensor, values: Tensor, fmt: Any, bench: Bench) -> KVCache:
    cache = KVCache.empty(tuple(keys.shape), (fmt, fmt), torch.bfloat16, bench.device)
    if not bench.compile_only:
        cache.append(keys, values)
    return cache


SCRIPT = Script(name="cuda_decode", doc=__doc__ or "", rows=rows, rounds=21)


if __name__ == "__main__":
    sys.exit(main(SCRIPT))
