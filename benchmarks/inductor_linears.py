"""Our Inductor backend against torchao PT2E (x86 quantizer, freezing) in one interleaved run.

    python -m benchmarks.inductor_linears [--quick] [--redo] [--only mlp-128,block-128]

Workloads: the two-linear MLP (1024-4096-1024) and the pre-LN block (768, 12 heads, 3072). Ours are
captured with dynamic batch and sequence; PT2E is exported at the timed shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers, workloads

WORKLOADS = (*(f"mlp-{rows}" for rows in (1, 16, 128, 512)),
             *(f"block-{tokens}" for tokens in (16, 128, 512)))
FP32 = "torch.compile fp32"
RECIPES = ("int8", "int8-dynamic", "int8-token", "fp8", "mxfp8", "mxfp4", "nvfp4", "int4")
# ours → the peer that does the same
PAIRS = {
    "int8": "PT2E static", "int8 + bf16": "PT2E static + bf16",
    "int8-dynamic": "PT2E dynamic", "int8-dynamic + bf16": "PT2E dynamic + bf16",
}
_TIMEOUT_S = 1800.0


def build(workload: workloads.Workload) -> dict[str, Callable[[], object]]:
    """Every candidate, compiled and run once."""
    from scaleprop.backends.inductor import InductorBackend

    inputs = workload.inputs
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str, call: Callable[..., Any]) -> None:
        def run() -> object:
            with torch.no_grad():
                return call(*inputs)

        run()
        runs[name] = run

    add(FP32, torch.compile(workload.model, dynamic=False))
    for recipe in RECIPES:
        compiled = peers.ours(workload, recipe, "inductor")
        add(recipe, lambda *leaves, run=compiled.executable: run(leaves))
        if recipe in ("int8", "int8-dynamic"):
            mixed = InductorBackend("bfloat16").lower(compiled.program)
            add(f"{recipe} + bf16", lambda *leaves, run=mixed: run(leaves))
    for dynamic in (False, True):
        name = "PT2E dynamic" if dynamic else "PT2E static"
        add(name, peers.pt2e(workload, dynamic))
        add(f"{name} + bf16", peers.autocast(peers.pt2e(workload, dynamic)))
    return runs


def worker(name: str, plan: harness.Plan) -> dict[str, Any]:
    """Timings of one workload, one thread."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000
    kind, _, rows = name.partition("-")
    workload = {"mlp": workloads.mlp, "block": workloads.block}[kind](int(rows))
    kept = [leaf.clone() for leaf in workload.inputs]
    runs = build(workload)
    overwritten = []
    for row, run in runs.items():
        run()
        for leaf, before in zip(workload.inputs, kept, strict=True):
            if not torch.equal(leaf, before):
                overwritten.append(row)
                leaf.copy_(before)
    timings = harness.measure(runs, plan)
    return {"overwritten": overwritten,
            "timings": {row: timing.to_dict() for row, timing in timings.items()}}


def tables(results: harness.Results) -> str:
    """Markdown: speed-up over compiled fp32, then ours over the matching PT2E."""
    sections = {key: value for key, value in results.sections.items() if "error" not in value}
    rows = list(dict.fromkeys(row for value in sections.values() for row in value["timings"]))
    lines = ["# Inductor: ours and PT2E", "", harness.machine_line(results.data["machine"]), "",
             "One thread, CPU time, median of per-round ratios.", "",
             "## Speed-up over compiled fp32 (* overwrote the caller's input)", ""]
    body = [[row, *(_over(value, row, FP32) for value in sections.values())] for row in rows]
    pairs = [[f"{mine} / {peer}", *(_over(value, mine, peer) for value in sections.values())]
             for mine, peer in PAIRS.items()]
    for key, value in results.sections.items():
        if "error" in value:
            lines.append(f"{key}: {value['error']}")
    return "\n".join([*lines, harness.markdown_table(["", *sections], body), "",
                      "## Ours over PT2E", "", harness.markdown_table(["", *sections], pairs)])


def _over(section: Mapping[str, Any], row: str, base: str) -> str | None:
    timings = section["timings"]
    if row not in timings or base not in timings:
        return None
    of, over = (harness.Timing.from_dict(timings[key]) for key in (row, base))
    star = "*" if base == FP32 and row in section["overwritten"] else ""
    return f"{harness.speedup(of, over, 'cpu').median:.2f}{star}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the workloads that the results file lacks, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, short samples")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--only", help="comma-separated workloads")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = harness.QUICK if options.quick else harness.Plan(rounds=21)
    if options.worker:
        options.out.write_text(json.dumps(worker(options.worker, plan)))
        return 0
    results = harness.Results("inductor_linears_quick" if options.quick else "inductor_linears",
                              options.results)
    for name in options.only.split(",") if options.only else WORKLOADS:
        done = results.sections.get(name)
        if done is not None and "error" not in done and not options.redo:
            continue
        flags = ["--worker", name] + ["--quick"] * options.quick
        section = harness.run_worker("benchmarks.inductor_linears", flags, _TIMEOUT_S,
                                     {"TORCHINDUCTOR_FREEZING": "1", "OMP_NUM_THREADS": "1"})
        results.add(name, section)
        results.write_markdown(tables(results))
        print(f"{name}: {section.get('error') or 'done'}", flush=True)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
