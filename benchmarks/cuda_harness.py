"""What the CUDA benchmarks share: time on a device, its ceilings, rows on their own, tables.

Rows run in a process of their own, one after the other. A row that fails is written with its error;
one that takes the device down, or too long, costs the process, and the next row gets a new one.
Kernels are compiled before, by several processes at once, none of which runs any.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.cuda_timing import Bench, Compiled, Skip, is_lost

GRACE = 20  # seconds of a process before its first row
WARMING = 0.4  # of all seconds, at most, of compiling ahead
Figures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured at a time. bounds: figure → what it must be at least. seconds: at most."""

    name: str
    run: Callable[[Bench], Figures]
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """One benchmark. name: of its module and of its files. rows: of real sizes, or small ones."""

    name: str
    doc: str
    rows: Callable[[bool], Sequence[Row]]
    rounds: int = 31
    package: str = "benchmarks"

    @property
    def module(self) -> str:
        return f"{self.package}.{self.name}"

    @property
    def title(self) -> str:
        return self.doc.splitlines()[0].rstrip(".")


def main(script: Script, arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 where a bound is missed or a row failed, 2 without a device."""
    options = options_of(script, arguments)
    until = time.monotonic() + options.seconds
    rows = [row for row in script.rows(options.smoke) if re.search(options.only, row.name)]
    if options.out:
        return _work(script, [row for row in rows if row.name in json.loads(options.worker)],
                     options)
    if options.smoke:
        bench = Bench(torch.device("cpu"), 1)
        found = {row.name: {**measured(row, bench), "bounds": {}} for row in rows}
        print(table(script, found, {}))
        return int(any("error" in each for each in found.values()))
    if not torch.cuda.is_available():
        print("no CUDA device: --smoke tries the script without one", file=sys.stderr)
        return 2
    results = harness.Results(script.name, options.results, fresh=options.only == "")
    results.data["machine"] |= device_info(script, arguments)
    _warm(script, rows, options)
    measure_all(script, rows, options, results, until)
    text = table(script, results.sections, results.data["machine"])
    results.write_markdown(text)
    print(text)
    return int(not all(is_good(row) for row in results.sections.values()))


def options_of(script: Script, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=script.doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true",
                        help="small sizes, anywhere, under Triton's interpreter; writes nothing")
    parser.add_argument("--only", default="", metavar="REGEX",
                        help="rows to measure; those of earlier runs stay")
    parser.add_argument("--seconds", type=float, default=220.0,
                        help="after so many, what is left is not measured")
    parser.add_argument("--rounds", type=int, default=script.rounds)
    parser.add_argument("--warm", type=int, default=8, metavar="N",
                        help="processes that compile kernels first; 0: none")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", default="[]", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------ rows, in a process of theirs


def measured(row: Row, bench: Bench) -> dict[str, Any]:
    """A row's figures and bounds; or its error, or why it was skipped."""
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        found = {"bounds": dict(row.bounds), **row.run(bench)}
    except Skip as why:
        found = {"skipped": str(why)}
    except Compiled:
        found = {}
    except Exception as error:  # noqa: BLE001  a row that fails is a row with its error
        found = {"error": harness.error_text(error, 400)}
    torch._dynamo.reset()
    gc.collect()
    return {**found, "took": round(time.perf_counter() - started, 1)}


def _work(script: Script, rows: Sequence[Row], options: argparse.Namespace) -> int:
    """In a worker: a line of ``options.out`` for each row; 3 where the device is lost."""
    device = torch.device("cpu" if options.smoke else "cuda")
    bench = Bench(device, options.rounds, compile_only=options.compile)
    with options.out.open("a") as out:
        for row in rows:
            found = measured(row, bench)
            print(json.dumps([row.name, found]), file=out, flush=True)
            if not options.smoke:
                if is_lost():
                    return 3
                torch.cuda.empty_cache()
    return 0


def _start(script: Script, names: Sequence[str], options: argparse.Namespace, out: Path,
           *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", script.module, "--worker", json.dumps(names),
               "--out", str(out), "--rounds", str(options.rounds),
               *["--smoke"] * options.smoke, *flags]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if flags else {}
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, cwd=harness.ROOT, stdout=log, stderr=log,
                                env={**os.environ, **threads})


def _warm(script: Script, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Fill the compilers' caches, in turns of rows; what is missing then costs its row the time."""
    count = min(options.warm, len(rows) // 2)
    with tempfile.TemporaryDirectory() as folder:
        running = [_start(script, [row.name for row in rows[place::count]], options,
                          Path(folder) / str(place), "--compile") for place in range(count)]
        until = time.monotonic() + WARMING * options.seconds
        for process in running:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure_all(script: Script, rows: Sequence[Row], options: argparse.Namespace,
             results: harness.Results, until: float) -> None:
    """All rows, each kept as it comes."""
    remaining = {row.name: row for row in rows}
    while remaining:
        late = time.monotonic() >= until
        why = f"not begun: {options.seconds:.0f} s were over" if late else _some(
            script, remaining, options, results, until)
        for name in list(remaining) if late else list(remaining)[:1]:
            results.add(name, {"error": why})
            print(f"{name}: {why}", flush=True)
            del remaining[name]


def _some(script: Script, remaining: dict[str, Row], options: argparse.Namespace,
          results: harness.Results, until: float) -> str:
    """Rows of one worker, taken off ``remaining``; why the next one has no figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        process = _start(script, list(remaining), options, out)
        began, read, why = time.monotonic() + GRACE, 0, ""
        try:
            while remaining and not why:
                ended = process.poll() is not None  # before reading: what it wrote is there
                lines = out.read_text().splitlines(keepends=True) if out.exists() else []
                for line in lines[read:]:
                    if line.endswith("\n"):
                        name, found = json.loads(line)
                        results.add(name, found)
                        print(f"{name}: {found.get('error') or found.get('skipped') or 'done'} "
                              f"({found['took']} s)", flush=True)
                        del remaining[name]
                        read, began = read + 1, time.monotonic()
                if not remaining:
                    break
                limit = next(iter(remaining.values())).seconds
                if ended:
                    why = f"exit status {process.returncode}: {_tail(out)}"
                elif time.monotonic() - began > limit:
                    why = f"no result within {limit:g} s"
                elif time.monotonic() > until:
                    why = f"not done: {options.seconds:.0f} s were over"
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    return why


def _tail(out: Path) -> str:
    text = out.with_suffix(".log").read_text(errors="replace")
    return " ".join(text.strip().splitlines()[-2:])[-300:]


# ------------------------------------------------------------------ tables


def device_info(script: Script, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Device, driver, versions and command."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20,
                                check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda,
            "triton": harness.version("triton"), "torch": torch.__version__,
            "torchao": harness.version("torchao"),
            "command": f"python -m {script.module} {given}".strip()}


def _shown(middle: float, low: float, high: float) -> str:
    """Median and quartiles."""
    texts = [f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
             for value in (middle, low, high)]
    return texts[0] if low == high else "{} [{}–{}]".format(*texts)


def is_good(row: Mapping[str, Any]) -> bool:
    """Whether it has its figures, or was skipped, and no bound is missed."""
    return "error" not in row and not _missed(row)


def _missed(row: Mapping[str, Any]) -> list[str]:
    """Bounds that a figure is below. Of peers that do not run here there are no figures."""
    figures = row.get("figures", {})
    return [name for name, least in row.get("bounds", {}).items()
            if name in figures and not figures[name][0] >= least]


def table(script: Script, rows: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]) -> str:
    """Markdown: figures with their bounds; then times; then what did not run."""
    figures: list[list[object]] = []
    times: list[list[object]] = []
    refused: list[list[object]] = []
    for name, row in rows.items():
        if why := row.get("error") or row.get("skipped"):
            refused.append([name, "the row", why])
        for figure, value in row.get("figures", {}).items():
            least = row["bounds"].get(figure)
            kept = None if least is None else "yes" if value[0] >= least else "**NO**"
            figures.append([name, figure, _shown(*value),
                            None if least is None else f"≥ {least:g}", kept])
        for candidate, seconds in row.get("seconds", {}).items():
            low, middle, high = (1e6 * each for each in seconds)
            times.append([name, candidate, f"{middle:.1f} [{low:.1f}–{high:.1f}]"])
        refused.extend([name, peer, why] for peer, why in row.get("refused", {}).items())
    head = [f"# {script.title}", "", *script.doc.strip().splitlines()[2:], ""]
    if info:
        head += [f"{info['device']}, driver {info['driver']}, CUDA {info['cuda']}; torch "
                 f"{info['torch']}, triton {info['triton']}, torchao {info['torchao']}; "
                 f"{info['when']}; `{info['command']}`", ""]
    parts = [harness.markdown_table(["row", "figure", "median [quartiles]", "must be", "is"],
                                    figures),
             harness.markdown_table(["row", "candidate", "µs, median [quartiles]"], times)]
    if refused:
        parts.append(harness.markdown_table(["row", "what", "did not run"], refused))
    return "\n".join(head) + "\n" + "\n\n".join(parts)
