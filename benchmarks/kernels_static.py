"""What compilers make of the CUDA kernels, without a device: registers, spills, shared memory.

    python -m benchmarks.kernels_static [--targets 90,100] [--only mxfp8]

Each kernel in each format is compiled ahead of time for every target. Writes
``benchmarks/results/kernels_static.{json,md}``, and fails where a kernel spills registers that did
not in the table that was there. Needs ``triton``, and TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import harness
from scaleprop.backends.cuda.constants import element_constants, scaling_constants
from scaleprop.formats import parse

RESULTS = harness.RESULTS / "kernels_static.json"
TARGETS = (80, 89, 90, 100, 120)
BLOCKS = ("mxfp8", "mxfp6", "mxfp4", "nvfp4", "e2m1[1x16]*ue5m3*f32", "e4m3[1x128]*f32",
          "e4m3[128x128]*f32")  # fmt: skip
ROWS = ("e4m3[row]*f32", "int8[row]*f32", "int8[tensor]*f32+zp")
FUSED = ("mxfp8", "mxfp4", "nvfp4", "e4m3[1x128]*f32", "e4m3[row]*f32", "int8[row]*f32+zp")
CACHES = ("e4m3[row]*f32", "int4[1x128]*f32+zp", "int4[1x32]*f16", "mxfp8", "mxfp4", None)
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel with its constants. pointers: type of each pointer that is not one of bytes."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    pointers: Mapping[str, str]
    warps: int = 4


def builds() -> Iterator[Build]:
    """All kernels, of bfloat16 in rows."""
    yield from _quantizing()
    yield from _attention()
    yield from _fused()


def _quantizing() -> Iterator[Build]:
    """Along both axes where they can."""
    from scaleprop.backends.cuda import quantizing
    from scaleprop.backends.cuda.kernels import groups, rows

    for name in BLOCKS:
        fmt = parse(name)
        assert fmt.block is not None
        r, c = fmt.block
        pointers = {"x": "*bf16", "bits": "*bf16", "amax": "*i32", "whole": "*fp32",
                    **dict.fromkeys(("stream", "step", "stream_t"), "*i64")}
        if fmt.scale.name == "f32":
            pointers |= {"scales": "*fp32", "scales_t": "*fp32"}
        for mode in ("nearest", "stochastic"):
            tile = quantizing.tile_of(fmt, (1, 0))
            yield Build(f"{name} both ways, {mode}", groups.quantize_kernel, {
                "E": element_constants(fmt.element), "S": scaling_constants(fmt),
                "R": r, "C": c, "ROWS": tile[0], "COLUMNS": tile[1], "ALONG": True,
                "ACROSS": True, "BITS": 8, "MODE": int(mode == "stochastic"),
                "PHILOX": mode == "stochastic"}, pointers, quantizing.warps_of(*tile))
        tile = quantizing.tile_of(fmt, (1,))
        yield Build(f"{name} along rows", groups.quantize_kernel, {
            "E": element_constants(fmt.element), "S": scaling_constants(fmt),
            "R": r, "C": c, "ROWS": tile[0], "COLUMNS": tile[1], "ALONG": True, "ACROSS": False,
            "BITS": 8, "MODE": 0, "PHILOX": False}, pointers, quantizing.warps_of(*tile))
    for name in ROWS:
        fmt = parse(name)
        yield Build(name, rows.rows_kernel, {
            "E": element_constants(fmt.element), "S": scaling_constants(fmt),
            "LEVELS": quantizing.levels_of(fmt),
            "MODE": quantizing.TENSOR if fmt.granularity.kind == "tensor" else quantizing.ROW,
            "ROWS": quantizing.ROWS_TILE[0], "COLUMNS": quantizing.ROWS_TILE[1]},
            {"x": "*bf16", "ranges": "*i32", "scales": "*fp32"})


def _attention() -> Iterator[Build]:
    """Eight heads of 128 that share a head of the cache: one new query of each, and sixteen."""
    from scaleprop.backends.cuda import attention
    from scaleprop.backends.cuda.constants import stored_constants
    from scaleprop.backends.cuda.kernels import attention as kernels

    floats = {"most": "*fp32", "total": "*fp32", "partial": "*fp32"}
    for name in CACHES:
        fmt = None if name is None else parse(name)
        stored = None if fmt is None else stored_constants(fmt)
        scales = "*u8" if fmt is None else {"f32": "*fp32", "f16": "*fp16"}.get(fmt.scale.name,
                                                                               "*u8")
        pointers = {"q": "*bf16", "lengths": "*i32", **floats, **dict.fromkeys(
            ("key_scales", "value_scales", "key_outer", "value_outer"), scales)}
        if stored is None:
            pointers |= {"keys": "*bf16", "values": "*bf16"}
        for count in (1, 16):
            rows, columns = attention.tile_of(8 * count, 128)
            yield Build(f"attention, {count} over {name or 'bf16'}", kernels.attention_kernel, {
                "K": stored, "V": stored, "HEADS": 8, "QUERIES": 8 * count, "T": count,
                "SCALE": 128**-0.5, "CAP": 0.0, "WINDOW": 0, "SPLITS": 16, "ROWS": rows,
                "COLUMNS": columns, "DEPTH": 128, "EXACT": False}, pointers)
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
                    "E": element_constants(fmt.element), "S": scaling_constants(fmt),
                    "C": fmt.block[1] if fmt.block else 1, "LEVELS": quantizing.levels_of(fmt),
                    "MODE": step, "NORM": norm, "FUNCTION": function, "GATED": not norm,
                    "GAIN": norm > 0, "BIAS": norm == 2, "EPS": 1e-5, "BETWEEN": 2, "WITHIN": 2,
                    "KEEP": False, "ROWS": rows, "COLUMNS": columns}, pointers)  # fmt: skip


_POINTERS = ("x", "bits", "amax", "data", "scales", "data_t", "scales_t", "whole", "stream", "step",
             "stream_t", "ranges", "zeros", "keys", "key_zeros", "values",
             "value_zeros")  # fmt: skip


def compiled(build: Build, target: int) -> Any:
    """The kernel for one target; widths and sizes are multiples of 16, columns are neighbours."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = build.kernel.arg_names
    constants = dict(build.constants)
    constants |= {name: 1 for name in ("column_stride", "up_column_stride") if name in names}
    signature = {name: "constexpr" if name in constants else build.pointers.get(
        name, "*u8" if name in _POINTERS else "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names
               if name not in constants and name != "seed"}
    source = ASTSource(
        fn=build.kernel, signature=signature, attrs=aligned,
        constexprs={(names.index(name),): value for name, value in constants.items()})
    return compile(source, target=GPUTarget("cuda", target, 32),
                   options={"num_warps": build.warps, "enable_fp_fusion": False})


def measured(build: Build, target: int) -> dict[str, Any]:
    """Registers a thread, bytes spilled a thread, bytes of shared memory; or what refused."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    found = compiled(build, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(found.asm["ptx"])
        said = subprocess.run(
            [get_ptxas(target).path, "-v", f"--gpu-name={sm_arch_from_capability(target)}", path,
             "-o", "/dev/null"], check=True, capture_output=True, text=True).stderr
    registers, spilled = _USED.search(said), _SPILLED.search(said)
    assert registers is not None and spilled is not None, said
    return {"registers": int(registers[1]), "spilled": int(spilled[1]) + int(spilled[2]),
            "shared": found.metadata.shared}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Kernels by targets: registers / bytes spilled / bytes of shared memory."""
    targets = sorted({target for cells in found.values() for target in cells}, key=int)
    lines = ["| kernel | " + " | ".join(f"sm_{target}" for target in targets) + " |",
             "| --- " * (len(targets) + 1) + "|"]
    for name, cells in found.items():
        shown = [_text(cells.get(target)) for target in targets]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _text(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['registers']} / {cell['spilled']} / {cell['shared']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write, and fail where spills are new."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--only", default="", help="start of the kernels' names")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before: dict[str, dict[str, Any]] = (
        json.loads(options.results.read_text()) if options.results.exists() else {})
    found = {name: dict(cells) for name, cells in before.items()}
    worse: list[str] = []
    chosen = [build for build in builds() if build.name.startswith(options.only)]
    for build in track(chosen, "kernels"):
        for target in options.targets.split(","):
            cell = measured(build, int(target))
            known = before.get(build.name, {}).get(target, {}).get("spilled", 0)
            if cell["spilled"] > known:
                worse.append(f"{build.name}, sm_{target}: spills {cell['spilled']} bytes a thread, "
                             f"{known} before")
            found.setdefault(build.name, {})[target] = cell
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    options.results.with_suffix(".md").write_text(
        "# CUDA kernels as compiled\n\nRegisters / bytes spilled / bytes of shared memory, of a "
        f"thread, a thread and a block.\n\n{text}\n")
    print(text)
    print("\n".join(worse), file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
