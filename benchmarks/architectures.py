"""Which architectures compile, and do they compute what the reference computes?

    python -m benchmarks.architectures [--recipe int8-dynamic --recipe mxfp8] [--only llama,bert]
    TRITON_INTERPRET=1 python -m benchmarks.architectures --backend cuda   # with no device

Each of the 25 models of ``benchmarks.models`` is compiled for a backend in a process of its own
(with a time limit), verified against the reference node by node and end to end, and run on inputs
of another size. Writes ``benchmarks/results/architectures.json`` (``…_cuda.json``) and prints the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.models import ZOO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
RECIPES = ("int8-dynamic", "mxfp8")
LIMIT = 600.0  # seconds for one model and recipe
MARK = "RESULT "  # starts the one line of a child's output that is for us


def measure(name: str, recipe: str, backend: str) -> dict[str, Any]:
    """Compile one model and compare; in this process.

    Returns ``status`` ``ok``, or ``refused`` with scaleprop's named error, and figures: seconds to
    compile, the errors of ``scaleprop.fidelity``, how many linears ran quantized, and whether the
    program ran on another size (``other``: the relative error there, None where all is fixed).
    """
    import torch

    import scaleprop
    from scaleprop.errors import ScalePropError

    torch.set_num_threads(1)
    sample = ZOO[name]()
    began = time.perf_counter()
    try:
        compiled = scaleprop.compile(sample.model, (sample.args, sample.kwargs), recipe=recipe,
                                     backend=backend)
        seconds = time.perf_counter() - began
        fidelity = compiled.verify()
        other = other_size_error(compiled, sample)
    except ScalePropError as error:
        return {"status": "refused", "error": f"{type(error).__name__}: {first_line(error)}",
                "seconds": time.perf_counter() - began}
    linears = [record for record in compiled.program.records if record.role == "fprop.w"]
    return {
        "status": "ok", "seconds": seconds, "lowering_error": fidelity.lowering_error,
        "format_error": fidelity.format_error, "cosine": fidelity.cosine, "other": other,
        "linears": len(linears),
        "quantized": sum(record.format is not None for record in linears),
        "bytes_ratio": compiled.nbytes / compiled.nbytes_before,
        "notes": list(compiled.program.notes),
    }  # fmt: skip


def other_size_error(compiled: Any, sample: Any) -> float | None:
    """Relative 2-norm error to the reference on the sample's other inputs.

    Raises:
        MismatchError: where it exceeds the end-to-end bound of ``scaleprop.fidelity``.
    """
    import torch
    from torch.utils import _pytree as pytree

    from scaleprop.backends.registry import backend_named
    from scaleprop.fidelity import compare

    if sample.other is None or not any(compiled.program.dynamic_axes.values()):
        return None
    args, kwargs = sample.other
    leaves = pytree.tree_leaves((args, kwargs))
    with torch.no_grad():
        plain = pytree.tree_leaves(sample.model(*args, **kwargs))
    reference = backend_named("reference").lower(compiled.program)
    found = compare(compiled.executable(leaves), reference(leaves), plain, "other size")
    return found.lowering_error


def first_line(error: BaseException) -> str:
    """What a table has room for."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def in_child(name: str, recipe: str, backend: str, limit: float) -> dict[str, Any]:
    """``measure`` in a fresh process; a crash or a time-out is a result, too."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--child", name,
               "--recipe", recipe, "--backend", backend]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    base = {"model": name, "recipe": recipe}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {**base, "status": "time-out", "error": f"more than {limit:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return {**base, **json.loads(line.removeprefix(MARK))}
    raised = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt)\b.*$", done.stderr, re.MULTILINE)
    reason = raised[-1] if raised else f"exit status {done.returncode}"
    return {**base, "status": "failed", "error": reason[:300]}


def table(rows: Sequence[dict[str, Any]], backend: str) -> Table:
    """The results, one row per model and recipe."""
    drawn = Table("model", "recipe", "status", "quantized", "bytes", "vs reference", "other size",
                  "vs model", "cosine", "compile s", title=f"Architectures on {backend}")
    for row in rows:
        if row["status"] != "ok":
            drawn.add_row(row["model"], row["recipe"], f"[red]{row['status']}[/red]",
                          row.get("error", ""))
            continue
        other = "fixed" if row["other"] is None else f"{row['other']:.1e}"
        drawn.add_row(
            row["model"], row["recipe"], "ok", f"{row['quantized']}/{row['linears']}",
            f"{row['bytes_ratio']:.2f}×", f"{row['lowering_error']:.1e}", other,
            f"{row['format_error']:.1e}", f"{row['cosine']:.5f}", f"{row['seconds']:.1f}")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 where a model failed without a named error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", action="append", help="default: int8-dynamic and mxfp8")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one compilation")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    recipes = options.recipe or list(RECIPES)
    if options.child:
        print(MARK + json.dumps(measure(options.child, recipes[0], options.backend)))
        return 0
    names = [name for name in options.only.split(",") if name] or list(ZOO)
    if unknown := [name for name in names if name not in ZOO]:
        parser.error(f"unknown models {unknown}; known: {', '.join(ZOO)}")
    work = [(name, recipe) for recipe in recipes for name in names]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(in_child, name, recipe, options.backend, options.limit)
                   for name, recipe in work]
        progress = track(futures, "compiling", console=Console(stderr=True))
        rows = [future.result() for future in progress]
    other = "" if options.backend == "onnxruntime" else f"_{options.backend}"
    path = options.json or RESULTS.with_stem(RESULTS.stem + other)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    console = Console(width=160)
    console.print(table(rows, options.backend))
    for recipe in recipes:
        good = sum(row["status"] == "ok" for row in rows if row["recipe"] == recipe)
        console.print(f"{recipe}: {good} of {len(names)} compile and agree with the reference")
    return int(any(row["status"] in ("failed", "time-out") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
