"""Speed, size, kernels and error of scaleprop against ONNX Runtime's and torchao's own tools.

    python -m benchmarks.ort_vs_peers            # everything
    python -m benchmarks.ort_vs_peers --quick    # a few minutes, few rounds
    python -m benchmarks.ort_vs_peers --only mlp-128,block-128 --redo

One process per workload. ONNX rows are compared with ORT on the float32 export, torch rows with
``torch.compile`` of the float32 model; all of them are timed in the same interleaved rounds. Our
ONNX files are run by the same plain session as the peers' files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers, workloads
from benchmarks.harness import Timing

ONNX_CLASSES = {"8-bit": ("ours int8", "ours int8-dynamic"),
                "4-bit": ("ours int4", "ours int4-int8")}
ONNX_RECIPES = ("int8", "int8-dynamic", "int4", "int4-int8")
INDUCTOR_ROWS = {  # row → recipe, what runs between its linears, PT2E's row of the same kind
    "ours int8, Inductor": ("int8", "float32", "torchao PT2E static"),
    "ours int8 + bf16, Inductor": ("int8", "bfloat16", "torchao PT2E static + bf16"),
    "ours int8-dynamic, Inductor": ("int8-dynamic", "float32", "torchao PT2E dynamic"),
}
LINEAR_RECIPES = ("mxfp4", "mxfp6", "nvfp4", "int8-dynamic")
PEER_CLASSES = {
    "ORT quantize_dynamic": "8-bit", "ORT quantize_static": "8-bit",
    "ORT quantize_static, linears only": "8-bit", "MatMulNBits 4-bit g32": "4-bit",
    "MatMulNBits 4-bit g128": "4-bit",
}
# Compiling these takes minutes per thread count; --all-torch measures them with two threads too.
_TORCH_ONE_THREAD = ("minilm-8x128", "minilm-1x128", "llama-128", "llama-1")
_TIMEOUT_S = 1200.0


# ------------------------------------------------------------------ one workload (worker process)


@dataclasses.dataclass
class Row:
    """One candidate's facts; ``error`` instead of everything else where its toolchain failed."""

    family: str  # "onnx" or "torch"
    error: str | None = None
    build_seconds: float | None = None
    file_bytes: int | None = None
    audit: dict[str, Any] | None = None
    sqnr_db: float | None = None
    keeps_input: bool | None = None
    max_difference: float | None = None  # to the reference backend, single linears only
    timings: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the worker needs while it measures one workload."""

    workload: workloads.Workload
    folder: Path
    expected: torch.Tensor
    rows: dict[str, Row]

    def guard(self, name: str, family: str, build: Callable[[], Any]) -> Any:
        """Run ``build``; a failing toolchain becomes a row with its error and gives None."""
        row = self.rows.setdefault(name, Row(family))
        if row.error is not None:
            return None
        try:
            return build()
        except Exception as error:  # noqa: BLE001 - any failure of a peer is a finding, shown
            row.error = harness.error_text(error)
            return None

    def check(self, name: str, run: Callable[[], Any], inputs: workloads.Inputs) -> None:
        """Record the error to the float32 model, and whether the inputs were left alone."""
        row = self.rows[name]
        result = run()
        output = torch.as_tensor(result[0] if isinstance(result, list) else result)
        row.sqnr_db = peers.sqnr_db(output, self.expected)
        row.keeps_input = all(
            torch.equal(a, b) for a, b in zip(inputs, self.workload.inputs, strict=True))


@torch.no_grad()
def worker(name: str, threads: Sequence[int], plan: harness.Plan, torch_rows: bool) -> dict:
    """Measure one workload; runs in a process of its own."""
    workload = workloads.ALL[name]()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(workload, Path(folder), workload.model(*workload.inputs), {})
        files = build_files(bench)
        for count in threads:
            torch.set_num_threads(count)
            calls = onnx_calls(bench, files, count)
            wide = count == 1 or name not in _TORCH_ONE_THREAD or torch_rows
            if wide and name not in workloads.SINGLE_LINEAR:
                calls |= torch_calls(bench)
            for row, timing in harness.measure(calls, plan).items():
                bench.rows[row].timings[str(count)] = timing.to_dict()
    return {
        "shapes": [list(x.shape) for x in workload.inputs], "linears": workload.linears,
        "linear_bytes": workload.linear_bytes, "plan": dataclasses.asdict(plan),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": {key: dataclasses.asdict(row) for key, row in bench.rows.items()},
    }


def build_files(bench: Bench) -> dict[str, Path]:
    """Every ONNX file of the workload, with size and kernel audit recorded."""
    workload, single = bench.workload, bench.workload.name in workloads.SINGLE_LINEAR
    source = bench.folder / "fp32.onnx"
    builders: dict[str, Callable[[Path], Path]] = {
        peers.ORT_FP32: lambda _: peers.export_fp32(workload.model, workload.inputs, source)}
    if not single:
        builders |= peers.onnx_peers(workload, source)
    for recipe in LINEAR_RECIPES if single else ONNX_RECIPES:
        builders[f"ours {recipe}"] = (
            lambda path, recipe=recipe: peers.ours_onnx(workload, recipe, path))
    files: dict[str, Path] = {}
    for number, (name, build) in enumerate(builders.items()):
        path = source if name == peers.ORT_FP32 else bench.folder / f"{number}.onnx"
        if bench.guard(name, "onnx", lambda b=build, p=path, n=name: _build(bench, n, b, p)):
            files[name] = path
    if single:
        for recipe in LINEAR_RECIPES:
            row = f"ours {recipe}"
            bench.guard(row, "onnx", lambda n=row, r=recipe: _compare(bench, n, r, files[n]))
    return files


def _build(bench: Bench, name: str, build: Callable[[Path], Path], path: Path) -> bool:
    started = time.perf_counter()
    build(path)
    row = bench.rows[name]
    row.build_seconds = round(time.perf_counter() - started, 2)
    row.file_bytes = peers.file_bytes(path)
    row.audit = peers.audit(path, bench.folder / "optimized.onnx").to_dict()
    return True


def _compare(bench: Bench, name: str, recipe: str, path: Path) -> None:
    """Largest difference between the file on ORT and the reference backend, over all inputs."""
    reference = peers.ours(bench.workload, recipe, "reference")
    running = peers.session(path, 1)
    largest = 0.0
    for inputs in (bench.workload.inputs, *bench.workload.calibration):
        actual = torch.as_tensor(peers.ort_call(running, inputs)()[0])
        largest = max(largest, float((actual - reference(*inputs)).abs().max()))
    bench.rows[name].max_difference = largest


def onnx_calls(bench: Bench, files: Mapping[str, Path], threads: int) -> dict[str, Callable]:
    """Checked, ready-to-time calls of the ONNX rows."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, path in files.items():
        inputs = tuple(x.clone() for x in bench.workload.inputs)

        def prepare(path: Path = path, inputs: workloads.Inputs = inputs, name: str = name) -> Any:
            call = peers.ort_call(peers.session(path, threads), inputs)
            bench.check(name, call, inputs)
            return call

        if (call := bench.guard(name, "onnx", prepare)) is not None:
            calls[name] = call
    return calls


def torch_calls(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Checked, ready-to-time calls of the torch rows, compiled for the current thread count."""
    workload = bench.workload
    builders: dict[str, Callable[[], Callable[..., Any]]] = dict(peers.torch_peers(workload))
    for name, (recipe, compute, _) in INDUCTOR_ROWS.items():
        builders[name] = (lambda recipe=recipe, compute=compute:
                          peers.ours_inductor(workload, recipe, compute))
    calls: dict[str, Callable[[], Any]] = {}
    for name, build in builders.items():
        inputs = tuple(x.clone() for x in workload.inputs)

        def prepare(build: Any = build, inputs: Any = inputs, name: str = name) -> Any:
            started = time.perf_counter()
            with peers.quiet():
                compiled = build()
                bench.check(name, lambda: compiled(*inputs), inputs)
            bench.rows[name].build_seconds = round(time.perf_counter() - started, 2)
            return lambda: compiled(*inputs)

        # no dynamo reset in between: it would invalidate the code of the earlier candidates
        if (call := bench.guard(name, "torch", prepare)) is not None:
            calls[name] = call
    return calls


# ------------------------------------------------------------------ tables


def tables(results: harness.Results) -> str:
    """All tables of the benchmark as Markdown."""
    parts = [
        "# ONNX Runtime and Inductor: scaleprop against the tools' own quantizers", "",
        f"Machine: {harness.machine_line(results.data['machine'])}", "",
        "Figures are speed-ups: median over interleaved rounds of the per-round ratio, quartiles "
        "in brackets. ONNX rows are relative to ORT fp32, torch rows to torch.compile fp32. CPU "
        "time of the process with one thread, wall time with two. ‘int kernels’ counts products "
        "with a constant weight in the graph that ORT optimised. ‘input kept’ is whether the "
        "caller's tensors were unchanged after the call.", "",
    ]
    sections = results.sections
    parts += summary(sections)
    for name, section in sections.items():
        parts += ["", f"## {name}", ""]
        if "error" in section:
            parts.append(f"failed: {section['error']}")
            continue
        parts.append(f"Inputs {section['shapes']}, {section['linears']} linears, "
                     f"{section['plan']['rounds']} rounds, {section['seconds']} s.")
        parts += ["", workload_table(section)]
    return "\n".join(parts)


def timing(section: Mapping[str, Any], row: str, threads: str) -> Timing | None:
    """A row's timing with so many threads; None where it has none."""
    data = section["rows"].get(row, {}).get("timings", {}).get(threads)
    return None if data is None else Timing.from_dict(data)


def ratio(section: Mapping[str, Any], row: str, over: str, threads: str) -> harness.Ratio | None:
    """Speed-up of one row over another, on the clock that suits the thread count."""
    of, base = timing(section, row, threads), timing(section, over, threads)
    if of is None or base is None:
        return None
    return harness.speedup(of, base, clock_for(threads))


def clock_for(threads: str) -> harness.Clock:
    """CPU time with one thread; wall time with more, where CPU time counts waiting threads."""
    return "cpu" if threads == "1" else "wall"


def best_peer(section: Mapping[str, Any], candidates: Sequence[str], base: str,
              threads: str) -> str | None:
    """The fastest of ``candidates`` by median speed-up."""
    found = {name: value.median for name in candidates
             if (value := ratio(section, name, base, threads)) is not None}
    return max(found, key=found.__getitem__) if found else None


def rivals(section: Mapping[str, Any], row: str) -> tuple[list[str], str]:
    """The peers that a row of ours is held against, and the baseline of its family."""
    if section["rows"][row]["family"] == "torch":
        names = [INDUCTOR_ROWS[row][-1]] if row in INDUCTOR_ROWS else []
        return [name for name in names if name in section["rows"]], peers.TORCH_FP32
    kind = next((key for key, names in ONNX_CLASSES.items() if row in names), None)
    names = [name for name, value in PEER_CLASSES.items() if value == kind]
    return [name for name in names if name in section["rows"]], peers.ORT_FP32


def workload_table(section: Mapping[str, Any]) -> str:
    """Every row of one workload."""
    rows = section["rows"]
    counts = sorted({count for row in rows.values() for count in row["timings"]}, key=int)
    single = any(row["max_difference"] is not None for row in rows.values())
    header = ["row"]
    for count in counts:
        header += [f"ms, {count} thr", f"speed-up, {count} thr", f"vs best peer, {count} thr"]
    header += ["size ratio", "int kernels", "SQNR dB", "input kept", "build s"]
    header += ["max diff to reference", "bytes / linears' fp32"] if single else []
    body = [_cells(section, name, row, counts, single) for name, row in rows.items()]
    return harness.markdown_table(header, body)


def _cells(section: Mapping[str, Any], name: str, row: Mapping[str, Any], counts: Sequence[str],
           single: bool) -> list[object]:
    if row["error"] is not None and not row["timings"]:
        return [name, row["error"]]
    names, base = rivals(section, name)
    cells: list[object] = [name]
    for count in counts:
        measured = timing(section, name, count)
        cells.append(None if measured is None else f"{measured.median_ms(clock_for(count)):.3g}")
        cells.append(ratio(section, name, base, count))
        peer = best_peer(section, names, base, count) if name.startswith("ours") else None
        versus = ratio(section, name, peer, count) if peer else None
        cells.append(f"{versus} ({peer})" if versus else None)
    size, fp32 = row["file_bytes"], section["rows"][peers.ORT_FP32]["file_bytes"]
    cells += [f"{size / fp32:.3f}" if size and fp32 else None,
              row["audit"]["text"] if row["audit"] else None,
              f"{row['sqnr_db']:.1f}" if row["sqnr_db"] is not None else None,
              {True: "yes", False: "**no**", None: None}[row["keeps_input"]],
              row["build_seconds"]]
    if single:
        difference = row["max_difference"]
        cells += [None if difference is None else f"{difference:.3g}",
                  f"{size / section['linear_bytes']:.4f}" if size else None]
    return cells


def summary(sections: Mapping[str, Any]) -> list[str]:
    """One line per workload: our rows against the best peer of their class."""
    wanted = ("ours int8", "ours int8-dynamic", "ours int4", "ours int4-int8", *INDUCTOR_ROWS)
    header = ["workload", "threads", *(f"{name} ÷ best peer" for name in wanted)]
    body: list[list[object]] = []
    for name, section in sections.items():
        if "error" in section or name in workloads.SINGLE_LINEAR:
            continue
        for count in ("1", "2"):
            cells = [_versus(section, row, count) for row in wanted]
            if any(cells):
                body.append([name, count, *cells])
    if not body:
        return []
    return ["## Against the best peer of the same width", "", harness.markdown_table(header, body)]


def _versus(section: Mapping[str, Any], row: str, threads: str) -> str | None:
    if row not in section["rows"]:
        return None
    names, base = rivals(section, row)
    peer = best_peer(section, names, base, threads)
    value = ratio(section, row, peer, threads) if peer else None
    return f"{value.median:.2f}" if value else None


# ------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workloads that the results file lacks, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, short samples")
    parser.add_argument("--only", help="comma-separated workloads")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--all-torch", action="store_true",
                        help="torch rows with two threads for the whole models too")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = harness.QUICK if options.quick else harness.Plan()
    if options.worker:
        threads = [int(count) for count in options.threads.split(",")]
        section = worker(options.worker, threads, plan, options.all_torch)
        options.out.write_text(json.dumps(section))
        return 0
    names = options.only.split(",") if options.only else [
        *workloads.MAIN, *workloads.SINGLE_LINEAR]
    results = harness.Results("ort_vs_peers_quick" if options.quick else "ort_vs_peers",
                              options.results)
    for name in names:
        done = results.sections.get(name)
        if done is not None and "error" not in done and not options.redo:
            print(f"{name}: already in {results.json_path}, skipped")
            continue
        flags = ["--worker", name, "--threads", options.threads]
        flags += ["--quick"] * options.quick + ["--all-torch"] * options.all_torch
        section = harness.run_worker("benchmarks.ort_vs_peers", flags, _TIMEOUT_S,
                                     {"TORCHINDUCTOR_FREEZING": "1"})
        results.add(name, section)
        results.write_markdown(tables(results))
        print(f"{name}: {section.get('error') or str(section['seconds']) + ' s'}", flush=True)
    results.write_markdown(tables(results))
    print(f"wrote {results.json_path} and {results.markdown_path}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
