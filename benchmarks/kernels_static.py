"""What compilers make of the CUDA kernels, without a device: registers, spills, shared memory.

    python -m benchmarks.kernels_static [--targets 90,100] [--only mxfp8]

Each kernel in each format is compiled ahead of time for every target. Writes
``benchmarks/results/kernels_static.{json,md}``, and fails where a kernel spills registers that did
not in the table that was there, or is compiled without the instruction that it is for. Needs
``triton``, and TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import harness
from benchmarks.kernel_builds import FLOAT8_TARGETS, POINTERS, Build, builds

RESULTS = harness.RESULTS / "kernels_static.json"
TARGETS = (80, 89, 90, 100, 120)
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled(build: Build, target: int) -> Any:
    """The kernel for one target; widths and sizes are multiples of 16, columns are neighbours."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = build.kernel.arg_names
    constants = dict(build.constants)
    if "E" in constants and target < FLOAT8_TARGETS[0]:
        constants["E"] = constants["E"]._replace(native=0)
        if constants["S"].item is not None:
            item = constants["S"].item._replace(native=0)
            constants["S"] = constants["S"]._replace(item=item)
    constants |= {name: 1 for name in ("column_stride", "up_column_stride") if name in names}
    signature = {name: "constexpr" if name in constants else build.pointers.get(
        name, "*u8" if name in POINTERS else "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names
               if name not in constants and name != "seed"}
    source = ASTSource(
        fn=build.kernel, signature=signature, attrs=aligned,
        constexprs={(names.index(name),): value for name, value in constants.items()})
    return compile(source, target=GPUTarget("cuda", target, 32),
                   options={"num_warps": build.warps, "num_stages": build.stages,
                            "enable_fp_fusion": False})


def measured(build: Build, target: int) -> dict[str, Any]:
    """Registers a thread, bytes spilled a thread, bytes of shared memory; or what refused.

    Raises:
        ValueError: where the compiler has not used the instruction that the kernel is for.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    found = compiled(build, target)
    if build.instruction not in found.asm["ptx"]:
        raise ValueError(f"{build.name}, sm_{target}: compiled without {build.instruction!r}")
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
    every = list(builds())
    names = {build.name for build in every}
    found = {name: dict(cells) for name, cells in before.items() if name in names}
    worse: list[str] = []
    chosen = [build for build in every if build.name.startswith(options.only)]
    for build in track(chosen, "kernels"):
        for target in options.targets.split(","):
            if build.targets and int(target) not in build.targets:
                continue
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
