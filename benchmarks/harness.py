"""Interleaved timing, results on disk and a description of the machine.

A ratio between two programs is only worth something when both saw the same machine. Every round
runs every candidate once, in a shuffled order, and gives one ratio per candidate; the result is
the median over rounds with its quartiles. Two clocks are read: wall time, and CPU time of the
whole process (all threads), which other work on the machine disturbs less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Clock = Literal["wall", "cpu"]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchao", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "transformers",
            "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure: rounds per candidate, seconds per sample, calls before the first."""

    rounds: int = 15
    min_seconds: float = 0.03
    warmup: int = 2
    max_calls: int = 2000
    seed: int = 0


QUICK = Plan(rounds=3, min_seconds=0.005, warmup=1)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round, by clock."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def seconds(self, clock: Clock) -> tuple[float, ...]:
        """The rounds' figures on one clock."""
        return self.wall if clock == "wall" else self.cpu

    def median_ms(self, clock: Clock) -> float:
        """Median milliseconds per call."""
        return 1e3 * statistics.median(self.seconds(clock))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain data for JSON."""
        return {"wall": list(self.wall), "cpu": list(self.cpu)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]]) -> Timing:
        """What ``to_dict`` wrote."""
        return cls(tuple(data["wall"]), tuple(data["cpu"]))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median and quartiles of per-round ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


def speedup(of: Timing, over: Timing, clock: Clock) -> Ratio:
    """How many times faster ``of`` is than ``over``: per-round ratios, median and quartiles."""
    pairs = zip(over.seconds(clock), of.seconds(clock), strict=True)
    ratios = sorted(slow / fast for slow, fast in pairs)
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)


def measure(candidates: Mapping[str, Callable[[], object]], plan: Plan) -> dict[str, Timing]:
    """Time every candidate in every round, in an order shuffled per round.

    A sample repeats the call until it lasts ``plan.min_seconds``; the number of calls is fixed
    per candidate before the first round.
    """
    calls = {name: _calls_per_sample(run, plan) for name, run in candidates.items()}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    shuffle = random.Random(plan.seed)
    order = list(candidates)
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan.rounds):
            shuffle.shuffle(order)
            for name in order:
                sample = _sample(candidates[name], calls[name])
                wall[name].append(sample[0])
                cpu[name].append(sample[1])
    finally:
        gc.enable()
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in candidates}


def _calls_per_sample(run: Callable[[], object], plan: Plan) -> int:
    for _ in range(plan.warmup):
        run()
    seconds = min(_sample(run, 1)[0] for _ in range(2))
    return max(1, min(plan.max_calls, round(plan.min_seconds / max(seconds, 1e-7))))


def _sample(run: Callable[[], object], calls: int) -> tuple[float, float]:
    run()  # brings its own weights back into the caches after another candidate ran
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def machine() -> dict[str, Any]:
    """CPU, instruction sets that matter here, cores, memory, load and package versions."""
    info = _cpu_info()
    flags = set(info.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": info.get("model name", platform.processor()),
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def machine_line(info: Mapping[str, Any]) -> str:
    """One line on the machine for the head of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in info["packages"].items()
                         if version and name in {"torch", "torchao", "onnxruntime", "onnx"})
    return (f"{info['cpu']} ({', '.join(info['flags'])}), {info['cores']} cores, "
            f"{info['memory_gib']} GiB, load {info['load'][0]}; "
            f"Python {info['python']}, {versions}; {info['when']}")


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """Sections of one benchmark in ``results/<name>.json``; a finished section is not run again."""

    def __init__(self, name: str, directory: Path = RESULTS, fresh: bool = False) -> None:
        self.json_path = directory / f"{name}.json"
        self.markdown_path = directory / f"{name}.md"
        directory.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = {"sections": {}}
        if self.json_path.exists() and not fresh:
            self.data = self._read()
        self.data["machine"] = machine()

    def _read(self) -> dict[str, Any]:
        """What is there; a file that nobody can read is put aside, and said to be."""
        try:
            data = json.loads(self.json_path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or not isinstance(data["sections"], dict):
                raise TypeError("no results with sections")
        except (ValueError, TypeError, KeyError) as error:
            aside = self.json_path.with_suffix(".json.damaged")
            self.json_path.replace(aside)
            print(f"{self.json_path}: {error_text(error)}; it is now {aside.name}, and all is "
                  "measured again", file=sys.stderr)
            return {"sections": {}}
        return data

    @property
    def sections(self) -> dict[str, Any]:
        """Finished sections, by key, in the order they were added."""
        return self.data["sections"]

    def add(self, key: str, section: Any) -> None:
        """Keep a section and write the file at once, so that an interruption loses nothing."""
        self.sections[key] = section
        _write(self.json_path, json.dumps(self.data, indent=1) + "\n")

    def write_markdown(self, text: str) -> None:
        """Write the tables next to the JSON."""
        _write(self.markdown_path, text.rstrip() + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A GitHub table; cells are turned into text, ``None`` into a dash."""
    def line(cells: Sequence[object]) -> str:
        texts = ("–" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def run_worker(
    module: str, arguments: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run ``python -m module *arguments --out FILE`` and return the JSON that it wrote.

    A crash or timeout returns ``{"error": …}`` with the last lines of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                                  env={**os.environ, **environment}, cwd=ROOT, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:.0f} s"}
        if done.returncode or not out.exists():
            tail = " ".join(done.stderr.strip().splitlines()[-3:])
            return {"error": f"exit status {done.returncode}: {tail}"}
        return json.loads(out.read_text())


def error_text(error: BaseException, limit: int = 160) -> str:
    """An exception as one short line for a table cell."""
    first = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {first}"[:limit]


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Peak resident bytes of this process since the block was entered (Linux).

    The kernel's high-water mark is reset on entry, so nothing is sampled and nothing missed.
    """
    Path("/proc/self/clear_refs").write_text("5")
    yield lambda: _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
