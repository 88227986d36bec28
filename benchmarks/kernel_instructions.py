"""How many instructions a number takes in the hot CUDA kernels, without a device.

    python -m benchmarks.kernel_instructions [--target 90]

Of kernels as compiled ahead of time: of one that quantizes a tile all instructions, of a product
those of its longest loop, over the numbers that a thread has of the tile or the step. Beside it, as
a measure: what an H200 issues in the time in which it moves a number's bytes at 85 % (quantize),
80 % (rotated) or 75 % (weights of few rows) of its memory's rate. NVFP4's x counts twice: its
largest magnitude is found before. Writes ``benchmarks/results/kernel_instructions.{json,md}``.
Needs ``triton``, and TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import harness
from benchmarks.kernel_builds import Build, builds
from benchmarks.kernels_static import compiled

RESULTS = harness.RESULTS / "kernel_instructions.json"
# an H200: multiprocessors, schedulers of each, lanes, clock in Hz; bytes a second
LANES, MEMORY = 132 * 4 * 32 * 1.98e9, 4.8e12
# a build's name: bytes of a number that are read and written, and the share asked for
HOT: dict[str, tuple[float, float]] = {
    r"mxfp8 along rows": (2 + 1 + 1 / 32, 0.85), r"mxfp4 along rows": (2 + 0.5 + 1 / 32, 0.85),
    r"nvfp4 along rows": (4 + 0.5 + 1 / 16, 0.85),
    r"e4m3\[1x128\]\*f32 along rows": (2 + 1 + 1 / 32, 0.85),
    r"mxfp4 along rows, rotated by \d+": (2 + 0.5 + 1 / 32, 0.80),
    r"nvfp4 along rows, rotated by \d+": (4 + 0.5 + 1 / 16, 0.80),
    r"pairs, bf16 × int4\[.*": (0.5 + 5 / 128, 0.75),
    r"pairs, bf16 × int4,.*": (0.5 + 2 / 128, 0.75),
    r"pairs, bf16 × mxfp4.*": (0.5 + 1 / 32, 0.75), r"pairs, bf16 × nvfp4.*": (0.5 + 1 / 16, 0.75),
    r"pairs, bf16 × e4m3\[row\].*": (1.0, 0.75),
}
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_BRANCH = re.compile(r"BRA[.\w]*\s+.*?`\((\.L_\w+)\)")


def disassembled(binary: bytes) -> str:
    """A kernel's instructions, by the tool that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True,
                              check=True).stdout


def counted(text: str) -> tuple[int, int]:
    """Instructions of a disassembled kernel, and of its longest loop."""
    labels: dict[str, int] = {}
    found, longest = 0, 0
    for line in text.splitlines():
        if (label := _LABEL.match(line)) is not None:
            labels[label[1]] = found
        elif (instruction := _INSTRUCTION.match(line)) is not None:
            found += 1
            if (branch := _BRANCH.search(instruction[1])) is not None and branch[1] in labels:
                longest = max(longest, found - labels[branch[1]])
    return found, longest


def hot() -> Iterator[tuple[Build, float, float]]:
    """Kernels, bytes of a number, the share asked for."""
    for build in builds():
        for name, (size, share) in HOT.items():
            if re.fullmatch(name, build.name):
                yield build, size, share


def measured(build: Build, size: float, share: float, target: int) -> dict[str, Any]:
    """Instructions a number, and how many there is time for."""
    whole, loop = counted(disassembled(compiled(build, target).asm["cubin"]))
    sides = build.constants
    step = sides["COLUMNS"] * sides.get("DEPTH", sides["ROWS"]) / (32 * build.warps)
    return {"instructions": round((loop if "DEPTH" in sides else whole) / step, 2),
            "time for": round(LANES / (MEMORY * share / size), 1)}


def main(arguments: list[str] | None = None) -> int:
    """Compile, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = {build.name: measured(build, size, share, options.target)
             for build, size, share in track(list(hot()), "kernels")}
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    lines = ["| kernel | instructions a number | time for |", "| --- | --- | --- |",
             *(f"| {name} | {cell['instructions']} | {cell['time for']} |"
               for name, cell in found.items())]
    text = "\n".join(lines)
    options.results.with_suffix(".md").write_text(
        f"# Instructions a number, sm_{options.target}\n\n{text}\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
