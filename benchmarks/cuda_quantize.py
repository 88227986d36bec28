"""Quantizing on a CUDA device, in shares of what it copies.

    python -m benchmarks.cuda_quantize [--only mxfp8] [--smoke]

x is 16384×8192 in bfloat16. Share: bytes read and written in a second, over those of a copy in the
same rounds. Bytes are those that must move: x once, once more where the whole tensor comes before
the first code, as with its own scale, or scales of its rows and columns ("once" is the share with
one reading all the same), codes and scales.
Beside it the same by torchao under ``torch.compile``, and by ``torch.compile`` alone: for MXFP8,
E4M3 rows and INT8 tokens as one would write it, else the operators that define the format here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_harness import Row, Script, main
from benchmarks.cuda_timing import COPY, Bench, Build, Skip
from scaleprop.backends.cuda import fusing, lines, quantizing
from scaleprop.formats import parse
from scaleprop.formats.rounding import Rounding
from scaleprop.ops import implementations

BLOCKS = ("mxfp8", "nvfp4", "mxfp4", "mxfp6")
ROWS = {"FP8 row": "e4m3[row]*f32", "INT8 token": "int8[row]*f32"}
LINES = {"FP8 row": ROWS["FP8 row"], "FP8 tensor": "fp8"}
ROTATED = ("mxfp8", "nvfp4", "mxfp4")
HELD = ("mxfp8", "nvfp4", "FP8 row")  # to LEAST
LEAST, LEAST_ROTATED = 0.85, 0.80
SHARE, ONCE = "share of copy", "share of copy, once"
PEERS = ("torchao", "torch.compile")
Quantize = Callable[..., Any]


def sizes(small: bool) -> tuple[int, int]:
    return (16, 128) if small else (16384, 8192)


def rows(small: bool) -> list[Row]:
    """Blocks along one axis and both, nearest and stochastic; rows; rotated; fused."""
    found: list[Row] = []
    for name in BLOCKS:
        for axes, where in (((1,), "rows"), ((1, 0), "both axes")):
            for mode in ("nearest", "stochastic"):
                held = name in HELD and mode == "nearest"
                found.append(_row(f"{name}, {where}, {mode}", name, LEAST if held else None,
                                  blocks(name, axes, mode), _peers(name) if (
                                      mode == "nearest" and len(axes) == 1) else {}))
    for name, fmt in ROWS.items():
        found.append(_row(name, fmt, LEAST if name in HELD else None, whole_rows(fmt),
                          _peers(fmt)))
        found.append(_row(f"{name}, of xᵀ", fmt, None, lines_of(fmt, (0,)), {}))
    for name, fmt in LINES.items():
        found.append(_row(f"{name}, both axes", fmt, None, lines_of(fmt, (1, 0)), {}, reads=2))
    for name in ROTATED:
        for block in (32, 128):
            found.append(_row(f"{name}, rotated by {block}", name, LEAST_ROTATED,
                              rotated(name, block), {}))
    for name in ("mxfp8", "nvfp4", "e4m3[row]*f32"):
        found.append(_row(f"{name}, RMS norm before", name, None, normed(name), {}))
    found.append(_row("mxfp8, SwiGLU before", "mxfp8", None, gated("mxfp8"), {}, inputs=2))
    return found


def _row(name: str, fmt: str, least: float | None, ours: Quantize,
         peers: dict[str, Callable[[], Quantize]], inputs: int = 1, reads: int = 1) -> Row:
    bounds = {} if least is None else {SHARE: least, **{f"× {peer}": 1.0 for peer in peers}}

    def run(bench: Bench) -> dict[str, Any]:
        return measure(bench, fmt, ours, peers, inputs, reads)

    return Row(name=name, run=run, bounds=bounds)


def measure(bench: Bench, fmt: str, ours: Quantize, peers: dict[str, Callable[[], Quantize]],
            inputs: int, reads: int) -> dict[str, Any]:
    """One row."""
    xs = [torch.randn(sizes(bench.small), device=bench.device).to(torch.bfloat16)
          for _ in range(inputs)]
    copy, copied = bench.copying()

    def on_x(make: Callable[[], Quantize]) -> Build:
        def build() -> Callable[[], object]:
            quantize = bench.compiled(make())
            return lambda: quantize(*xs)

        return build

    found = bench.compare({"ours": lambda: lambda: ours(*xs), COPY: copy,
                           **{name: on_x(make) for name, make in peers.items()}}, PEERS)
    written = _bytes(found.results["ours"])
    reads = 2 if parse(fmt).two_level else reads
    once, moved = (sum(x.nbytes for x in xs) * count + written for count in (1, reads))
    figures: dict[str, list[float] | None] = {
        SHARE: found.share("ours", moved, COPY, copied),
        ONCE: found.share("ours", once, COPY, copied) if reads > 1 else None,
        "GB/s": found.rate("ours", moved / 1e9), "copy GB/s": found.rate(COPY, copied / 1e9),
        **{f"× {peer}": found.faster("ours", peer) for peer in peers}}
    return found.result(figures)


def _bytes(parts: Any) -> int:
    return parts.nbytes if isinstance(parts, Tensor) else sum(map(_bytes, parts))


# ------------------------------------------------------------------ ours


def blocks(name: str, axes: Sequence[int], mode: str) -> Quantize:
    """Stochastic: 8 bits of the stream that the reference draws."""
    fmt, rounding = parse(name), Rounding(mode, 0 if mode == "nearest" else 8)
    held: list[quantizing.Draw] = []

    def run(x: Tensor) -> Any:
        if not held and mode != "nearest":
            held.append(quantizing.Draw(1, *(torch.tensor([each], device=x.device)
                                             for each in (2, 3, 4))))
        return quantizing.quantize_groups(x, fmt, axes, rounding, held[0] if held else None)

    return run


def whole_rows(name: str) -> Quantize:
    fmt = parse(name)
    return lambda x: quantizing.quantize_rows(x, fmt)


def lines_of(name: str, axes: Sequence[int]) -> Quantize:
    fmt = parse(name)
    return lambda x: lines.quantize_lines(x, fmt, axes)


def rotated(name: str, block: int) -> Quantize:
    fmt = parse(name)
    return lambda x: quantizing.quantize_groups(x, fmt, rotation=quantizing.Rotation(block))


def normed(name: str) -> Quantize:
    fmt, between = parse(name), torch.bfloat16
    return lambda x: fusing.norm_quantize(x, fmt, "rms", x[0], between=between)


def gated(name: str) -> Quantize:
    fmt = parse(name)
    return lambda gate, up: fusing.gated_quantize(gate, up, fmt, "silu", torch.bfloat16)


# ------------------------------------------------------------------ peers


def _peers(name: str) -> dict[str, Callable[[], Quantize]]:
    plain = {"mxfp8": plain_mxfp8, **{fmt: plain_rows(fmt) for fmt in ROWS.values()}}
    own = plain.get(name, lambda x: implementations.quantize(x, name))
    return {"torchao": lambda: torchao(name), "torch.compile": lambda: own}


def plain_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 32 along rows, exponents rounded down."""
    grouped = x.float().reshape(len(x), -1, 32)
    exponent = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-119).log2().floor() - 8
    codes = (grouped * torch.exp2(-exponent)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), (exponent + 127).to(torch.uint8).squeeze(-1)


def plain_rows(name: str) -> Quantize:
    """A scale a row: largest magnitude over the largest code."""
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.float()
        integer = name.startswith("int8")
        top = 127.0 if integer else 448.0
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
        units = (values / scale).clamp(-top, top)
        return (units.round().to(torch.int8) if integer
                else units.to(torch.float8_e4m3fn)), scale

    return run


def torchao(name: str) -> Quantize:
    """torchao's of the same format.

    Raises:
        Skip: where it has none here.
    """
    try:
        from torchao.prototype.mx_formats import mx_tensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import Int8Tensor
    except ImportError as error:
        raise Skip(f"torchao: {error}") from error

    def nvfp4(x: Tensor) -> Any:
        scale = per_tensor_amax_to_scale(x.abs().amax().float())
        made = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
        return made.qdata, made.scale

    def rows_of(kind: Any) -> Quantize:
        def run(x: Tensor) -> Any:
            made = kind.from_hp(x, granularity=PerRow())
            return made.qdata, made.scale

        return run

    elements: dict[str, Any] = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2,
                                "mxfp6": "fp6_e2m3"}
    if name in elements:
        return lambda x: mx_tensor.to_mx(x, elements[name], 32)
    return {"nvfp4": nvfp4, ROWS["FP8 row"]: rows_of(Float8Tensor),
            ROWS["INT8 token"]: rows_of(Int8Tensor)}[name]


SCRIPT = Script(name="cuda_quantize", doc=__doc__ or "", rows=rows)


if __name__ == "__main__":
    sys.exit(main(SCRIPT))
