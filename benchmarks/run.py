"""All benchmarks in one command: one after the other, resumed, summed up in one table.

    python -m benchmarks.run                         # what has no results yet
    python -m benchmarks.run --only casts,int4_cnn   # chosen ones
    python -m benchmarks.run --quick                 # a few, in seconds each
    python -m benchmarks.run --fresh                 # everything again
    python -m benchmarks.run --summarise             # the table, from the results that are there
    python -m benchmarks.run --list

Each benchmark runs in a process of its own; one that fails, or takes three times as long as it
should, is a row that says so, and the exit status is then 1. What a machine cannot run is left
out with its reason. Interrupted, it goes on where it stopped. Writes ``summary.json`` and
``summary.md`` to ``benchmarks/results``, or to its folder ``quick``; what benchmarks print, to
``demo/benchmarks``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import harness
from benchmarks.figures import Figures
from benchmarks.registry import BENCHMARKS, Benchmark

DONE, AGAIN = ("ok", "on disk"), "to be run again"  # statuses
QUICK_SECONDS, TIMES = 300.0, 3.0  # after which a run ends: a quick one, and × its minutes
LOGS = harness.ROOT / "demo" / "benchmarks"
Row = dict[str, Any]


def missing(benchmark: Benchmark) -> str | None:
    """Why this machine cannot run it."""
    absent = [name for name in benchmark.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: pip install \"scaleprop[dev]\""
    if benchmark.device:
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device"
    return None


def commit() -> str:
    """The commit that is measured, ``+`` where files differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=harness.ROOT, capture_output=True,
                              text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))


def load(path: Path) -> Any:
    """What a benchmark wrote."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return json.loads(path.read_text(encoding="utf-8"))


def summed_up(benchmark: Benchmark, path: Path) -> Row:
    """Figures, machine and tables of results on disk; or why there are none."""
    if not path.exists():
        return {"problem": f"no {path.name}"}
    tables = [path.with_suffix(suffix).name for suffix in (".md", ".txt")
              if path.with_suffix(suffix).exists()]
    row: Row = {"tables": tables[0] if tables else path.name}
    try:
        data = load(path)
        machine = data.get("machine") if isinstance(data, dict) else None
        figures: Figures = benchmark.figures(data)
        described = {"machine": harness.machine_line(machine)} if machine else {}
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration,
            OSError, csv.Error) as error:  # whatever a file holds, the other benchmarks run
        return row | {"problem": f"{path.name}: {harness.error_text(error)}"}
    return row | described | {"figures": {  # JSON has no other numbers
        label: value if isinstance(value, str) or math.isfinite(value) else str(value)
        for label, value in figures.items()}}


class Suite:
    """The benchmarks that are asked for, and what is known of each."""

    lock: int | None = None  # of the folder, which benchmarks inherit

    def __init__(self, folder: Path, quick: bool, logs: Path = LOGS) -> None:
        self.folder, self.quick, self.logs = folder, quick, logs
        self.results = harness.Results("summary", folder)
        self.results.data["commit"] = commit()

    @property
    def rows(self) -> dict[str, Row]:
        """Module → its row."""
        return self.results.sections

    def command(self, benchmark: Benchmark) -> list[str]:
        """What runs it."""
        given = list((benchmark.quick if self.quick else benchmark.arguments) or ())
        if self.rows.get(benchmark.module, {}).get("status") == AGAIN:
            given += benchmark.again
        return [sys.executable, "-m", f"benchmarks.{benchmark.module}",
                *(each.format(folder=self.folder) for each in given)]

    def run(self, benchmark: Benchmark) -> Row:
        """One benchmark, from start to end."""
        started, path = time.time(), benchmark.path(self.folder)
        before = _state(path)
        seconds = QUICK_SECONDS if self.quick else 60 * TIMES * benchmark.minutes
        log = self.logs / f"{benchmark.module}.log"
        self.logs.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items()
                       if benchmark.interpreted or name != "TRITON_INTERPRET"}
        with log.open("w", encoding="utf-8") as output:
            status = _ended(self.command(benchmark), seconds, output, environment, self.lock)
        found = summed_up(benchmark, path)
        if _state(path) == before:
            if status or status is None:
                found.pop("figures", None)  # of an earlier run
            elif "figures" in found:
                return {"status": "on disk", **found}
        row: Row = {"status": "ok", "seconds": round(time.time() - started, 3),
                    "commit": self.results.data["commit"],
                    "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                    "machine": harness.machine_line(self.results.data["machine"]), **found}
        said = log.read_text(encoding="utf-8", errors="replace")
        last = " ".join(said.strip().splitlines()[-2:])[-200:]
        if status is None:
            row |= {"status": "too long", "problem": f"ended after {seconds:.0f} s; {last}"}
        elif status:
            row |= {"status": "failed", "problem": f"exit status {status}: {last}"}
        elif "problem" in row:
            row["status"] = "failed"
        return row

    def run_all(self, chosen: Sequence[Benchmark], fresh: bool, console: Console) -> None:
        """Those that have not ended well; rows are kept as they come."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(
            "{task.completed:.0f} of {task.total:.0f} minutes"), TimeElapsedColumn())
        if fresh:  # known to a later call, should this one be interrupted
            for benchmark in chosen:
                self.results.add(benchmark.module, {"status": AGAIN})
        todo = [benchmark for benchmark in chosen
                if self.rows.get(benchmark.module, {}).get("status") not in DONE
                or "problem" in summed_up(benchmark, benchmark.path(self.folder))]
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=sum(each.minutes for each in todo))
            for benchmark in todo:
                progress.update(task, description=benchmark.module)
                why = missing(benchmark)
                row = {"status": "skipped", "problem": why} if why else self.run(benchmark)
                self.results.add(benchmark.module, row)
                self.write()
                progress.console.print(line(benchmark.module, row), markup=False, soft_wrap=True)
                progress.advance(task, benchmark.minutes)
        self.write()  # an earlier run may have ended before it did

    def summarise(self, chosen: Sequence[Benchmark]) -> None:
        """Rows from what is on disk; how a run ended stays known."""
        for benchmark in chosen:
            found = summed_up(benchmark, benchmark.path(self.folder))
            before = self.rows.get(benchmark.module, {})
            if "figures" in found:
                ran = before.get("status") not in (None, "not run", "skipped")
                found = {"status": "on disk", **(before if ran else {}), **found}
            elif before.get("status") in (None, "not run", *DONE):
                found = {"status": "not run", **found}
            else:
                found = before
            self.results.add(benchmark.module, found)
        self.write()

    def write(self) -> None:
        """The table in Markdown."""
        order = [name for name in BENCHMARKS if name in self.rows]
        self.results.write_markdown(markdown(
            {name: self.rows[name] for name in order}, self.results.data))


def _state(path: Path) -> tuple[int, int] | None:
    """Changes where a file is written."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A lock of ``folder``, which benchmarks hold as well: one that outlived a killed run would
    write there, and disturb what is measured."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{folder}: another run, or a benchmark that a killed one left, still works "
                     "there")
        yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def _ends_when_told() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, with the benchmark that is running."""
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(command: Sequence[str], seconds: float, output: Any,
           environment: Mapping[str, str], lock: int | None = None) -> int | None:
    """The exit status; None where it took too long. No process of its group outlives this call."""
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=output, stderr=subprocess.STDOUT,
                          env=environment, start_new_session=True,
                          pass_fds=() if lock is None else (lock,)) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def shown(figures: Mapping[str, float | str]) -> str:
    """Figures on one line."""
    return "; ".join(f"{label}: {value if isinstance(value, str) else format(value, '.4g')}"
                     for label, value in figures.items())


def line(name: str, row: Row) -> str:
    """A row for the terminal."""
    said = [row["problem"]] if "problem" in row else []
    return f"{name}: {row['status']}. " + " ".join([*said, shown(row.get("figures", {}))])


def markdown(rows: Mapping[str, Row], data: Mapping[str, Any]) -> str:
    """All rows in one table, then the machines that measured them."""
    machines = list(dict.fromkeys(row["machine"] for row in rows.values() if "machine" in row))
    body = []
    for name, row in rows.items():
        seconds, text = row.get("seconds"), shown(row.get("figures", {}))
        problem = f"**{row['problem']}**" if row.get("problem") else ""
        body.append([
            f"`{name}`", row["status"], None if seconds is None else f"{seconds / 60:.1f}",
            " ".join(filter(None, (problem, text))) or None,
            f"[{row['tables']}]({row['tables']})" if row.get("tables") else None,
            machines.index(row["machine"]) + 1 if "machine" in row else None])
    return "\n".join([
        "# All benchmarks", "",
        f"Written by `python -m benchmarks.run` at commit {data['commit']} on "
        f"{harness.machine_line(data['machine'])}.", "",
        "Rows that are ‘on disk’ were measured before, where the last column says.", "",
        harness.markdown_table(
            ["benchmark", "status", "minutes", "figures", "tables", "machine"], body), "",
        *(f"{number}. {machine}" for number, machine in enumerate(machines, 1))])


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Benchmark]]:
    """The command line, and the benchmarks that it chooses."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="modules, separated by commas")
    parser.add_argument("--quick", action="store_true", help="those that have a quick form, in it")
    parser.add_argument("--fresh", action="store_true", help="also what has results")
    parser.add_argument("--resume", dest="fresh", action="store_false", help="the default")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="what there is, and what it needs")
    parser.add_argument("--results", type=Path, help="another folder for a quick run's results")
    options = parser.parse_args(arguments)
    if options.results and not (options.quick or options.summarise):
        parser.error("--results goes with --quick or --summarise: full runs write to "
                     "benchmarks/results")
    only = dict.fromkeys(name.strip() for name in options.only.split(","))
    names = [name for name in only if name] or [
        name for name, each in BENCHMARKS.items() if each.quick is not None or not options.quick]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmarks {unknown}; known: {', '.join(BENCHMARKS)}")
    if slow := [name for name in names if options.quick and BENCHMARKS[name].quick is None]:
        parser.error(f"{slow} have no quick form here: run them by themselves")
    return options, [BENCHMARKS[name] for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or only sum up; 1 where a benchmark failed."""
    options, chosen = parsed(arguments)
    if options.list:
        for each in chosen:
            print(f"{each.module:24} {each.minutes:5.0f} min  {missing(each) or 'can run here'}")
        return 0
    folder = options.results or (harness.RESULTS / "quick" if options.quick else harness.RESULTS)
    with _ends_when_told(), _alone(folder.resolve()) as lock:
        suite = Suite(folder.resolve(), options.quick)
        suite.lock = lock
        if options.summarise:
            suite.summarise(chosen)
        else:
            suite.run_all(chosen, options.fresh, Console(stderr=True))
    print(f"wrote {suite.results.markdown_path}")
    return int(any(suite.rows[each.module]["status"] in ("failed", "too long")
                   for each in chosen))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
