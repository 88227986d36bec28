"""All benchmarks in one command: figures are those of the tables, troubles are rows, nothing is run
twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness, run
from benchmarks.registry import BENCHMARKS, Benchmark

FOLDER = Path(run.__file__).parent
# no benchmarks, or a part of one
APART = {"run", "demo", "readme_table", "llm_compressor_rows", "block_pictures",
         "report_screenshots"}


def test_every_benchmark_is_registered_and_listed() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert modules - APART == set(BENCHMARKS)
    listed = re.findall(r"^\| `python -m benchmarks\.(\w+)` \|", (FOLDER / "README.md").read_text(),
                        re.MULTILINE)
    assert set(listed) - APART == set(BENCHMARKS)


@pytest.mark.parametrize("benchmark", [each for each in BENCHMARKS.values()
                                       if each.path().exists()],
                         ids=lambda each: each.module)
def test_figures_of_the_results_that_are_kept(benchmark: Benchmark) -> None:
    row = run.summed_up(benchmark, benchmark.path())
    assert "problem" not in row and row["figures"]
    assert all(isinstance(value, str) or math.isfinite(value) for value in row["figures"].values())
    assert (harness.RESULTS / row["tables"]).exists()


def cells(name: str, row: str) -> list[str]:
    """A row of a benchmark's own table."""
    lines = (harness.RESULTS / f"{name}.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def figure(name: str, label: str) -> str:
    value = run.summed_up(BENCHMARKS[name], BENCHMARKS[name].path())["figures"][label]
    return value if isinstance(value, str) else f"{value:.2f}"


@pytest.mark.parametrize(("name", "label", "row", "column"), [
    ("casts", "nvfp4 ÷ copy_", "ours, operator, nvfp4", 1),
    ("emulated_step", "mxfp8 step ÷ BF16's", "mxfp8", 2),
    ("optimizer_state", "fp8: times smaller", "1 | fp8", 5),
    ("compile_cost", "llama-494m int4, checked: time ÷ peer's", "llama-494m | ours int4", 3),
    ("training_recipes", "nvfp4: loss to bf16's", "nvfp4", 2),
])
def test_figures_are_those_of_the_tables(name: str, label: str, row: str, column: int) -> None:
    assert figure(name, label).split()[0] == cells(name, row)[column].split()[0]


Codes = Callable[[dict[str, str]], list[str]]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Codes:
    """Registers benchmarks that run the code given; returns which have run, in order."""
    monkeypatch.setattr(run.Suite.__init__, "__defaults__", (tmp_path / "logs",))
    ran: list[str] = []

    def register(codes: dict[str, str]) -> list[str]:
        monkeypatch.setattr(run, "BENCHMARKS", {name: Benchmark(
            module=name, minutes=1, quick=("{folder}",), again=("--redo",),
            packages=("nowhere",) if name == "absent" else (),
            figures=lambda data: {"speed": data["speed"]}) for name in codes})
        real = run.Suite.command

        def command(suite: run.Suite, benchmark: Benchmark) -> list[str]:
            arguments = real(suite, benchmark)[3:]
            ran.append(benchmark.module + " again" * ("--redo" in arguments))
            return [sys.executable, "-c", codes[benchmark.module], *arguments]

        monkeypatch.setattr(run.Suite, "command", command)
        return ran

    return register


WRITES = ("import sys, pathlib; pathlib.Path(sys.argv[1], '{}.json').write_text("
          "'{{\"speed\": 2.5}}')")


def quick(folder: Path, *more: str) -> int:
    return run.main(["--quick", "--results", str(folder), *more])


def test_troubles_are_rows_and_the_rest_runs(
    fakes: Codes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "QUICK_SECONDS", 5.0)
    ran = fakes({
        "broken": "import sys; print('no such layer'); sys.exit(3)",
        "absent": "",
        "endless": "import subprocess, sys, time; print('started', flush=True); "
                   "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
                   "time.sleep(60)",
        "silent": "",
        "odd": "import sys, pathlib; pathlib.Path(sys.argv[1], 'odd.json').write_text('[]')",
        "fine": WRITES.format("fine"),
    })
    assert quick(tmp_path) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["sections"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "broken": "failed", "absent": "skipped", "endless": "too long", "silent": "failed",
        "odd": "failed", "fine": "ok"}
    for name, said in (("broken", "exit status 3: no such layer"), ("absent", "needs nowhere"),
                       ("endless", "ended after 5 s; started"), ("silent", "no silent.json"),
                       ("odd", "odd.json: TypeError")):
        assert said in rows[name]["problem"]
    assert rows["fine"]["figures"] == {"speed": 2.5} and rows["fine"]["seconds"] > 0
    table = (tmp_path / "summary.md").read_text()
    assert "| `fine` | ok |" in table and "speed: 2.5" in table and "**no silent.json**" in table
    assert ran == ["broken", "endless", "silent", "odd", "fine"]


def test_it_goes_on_where_it_stopped(
    fakes: Codes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fakes({name: WRITES.format(name) for name in ("one", "two", "three")})
    real = run.Suite.run

    def interrupted(suite: run.Suite, benchmark: Benchmark) -> run.Row:
        if benchmark.module == "two":
            raise KeyboardInterrupt
        return real(suite, benchmark)

    with monkeypatch.context() as patch:
        patch.setattr(run.Suite, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path)
    assert quick(tmp_path) == 0 and ran == ["one", "two", "three"]
    assert quick(tmp_path) == 0 and len(ran) == 3  # nothing is left to run

    ran.clear()
    with monkeypatch.context() as patch:
        patch.setattr(run.Suite, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path, "--fresh")
    assert quick(tmp_path) == 0 and ran == ["one again", "two again", "three again"]


def test_whatever_a_benchmark_leaves_the_rest_runs(
    fakes: Codes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = "import sys, pathlib; pathlib.Path(sys.argv[1], '{}.json').write_text('{}')"
    fakes({
        "bytes": "import sys; sys.stdout.buffer.write(b'no \\xff layer'); sys.exit(3)",
        "nothing": writes.format("nothing", '{"speed": {"of": []}}'),
        "strange": writes.format("strange", '{"speed": 1, "machine": "x"}'),
        "nan": writes.format("nan", '{"speed": NaN}'),
        "stale": "import sys; sys.exit(4)",
        "kept": "", "fine": WRITES.format("fine")})
    figures = dataclasses.replace(run.BENCHMARKS["nothing"], figures=lambda data: {
        "speed": next(iter(data["speed"]["of"]))})
    run.BENCHMARKS["nothing"] = figures
    for name in ("stale", "kept"):
        (tmp_path / f"{name}.json").write_text('{"speed": 99}')
    (tmp_path / "summary.json").write_text('{"sections": {"fi')
    assert quick(tmp_path, "--only", ", ".join([*run.BENCHMARKS, "fine"])) == 1
    assert "summary.json: JSONDecodeError" in capsys.readouterr().err
    assert (tmp_path / "summary.json.damaged").read_text() == '{"sections": {"fi'
    text = (tmp_path / "summary.json").read_text()
    rows = json.loads(text)["sections"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "bytes": "failed", "nothing": "failed", "strange": "failed", "nan": "ok",
        "stale": "failed", "kept": "on disk", "fine": "ok"}
    assert "no \ufffd layer" in rows["bytes"]["problem"] and "NaN" not in text
    assert "figures" not in rows["stale"] and rows["kept"]["figures"] == {"speed": 99}
    assert "commit" not in rows["kept"] and "Python" in rows["fine"]["machine"]


def test_results_that_are_gone_are_measured_again(fakes: Codes, tmp_path: Path) -> None:
    ran = fakes({"one": WRITES.format("one")})
    assert quick(tmp_path) == 0
    (tmp_path / "one.json").write_text("{")
    assert quick(tmp_path, "--summarise") == 0
    row = json.loads((tmp_path / "summary.json").read_text())["sections"]["one"]
    assert row["status"] == "not run" and "one.json" in row["problem"] and "figures" not in row
    (tmp_path / "one.json").write_text('{"speed": 3.5}')
    assert quick(tmp_path, "--summarise") == 0
    row = json.loads((tmp_path / "summary.json").read_text())["sections"]["one"]
    assert (row["status"], row["figures"]) == ("on disk", {"speed": 3.5}) and "problem" not in row
    (tmp_path / "one.json").unlink()
    (tmp_path / "summary.md").unlink()
    assert quick(tmp_path) == 0 and len(ran) == 2
    (tmp_path / "summary.md").unlink()  # as where a run was killed before it was written
    assert quick(tmp_path) == 0 and len(ran) == 2
    assert "speed: 2.5" in (tmp_path / "summary.md").read_text()


KILLED = """
import pathlib, sys
from benchmarks import run
from benchmarks.registry import Benchmark
run.Suite.__init__.__defaults__ = (pathlib.Path(sys.argv[1]),)
run.BENCHMARKS = {"endless": Benchmark(module="endless", minutes=1, quick=(), figures=dict)}
run.Suite.command = lambda *_: [sys.executable, "-c", sys.argv[2], sys.argv[1]]
run.main(["--quick", "--results", sys.argv[1]])
"""
ENDLESS = ("import os, pathlib, sys, time; path = pathlib.Path(sys.argv[1], 'pid'); "
           "path.with_suffix('.part').write_text(str(os.getpid())); "
           "path.with_suffix('.part').replace(path); time.sleep(60)")


@pytest.mark.parametrize("with_what", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_benchmark_that_disturbs_the_next(
    with_what: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), ENDLESS]
    with subprocess.Popen(command, cwd=harness.ROOT, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(with_what)
    benchmark = int((tmp_path / "pid").read_text())
    if with_what == signal.SIGTERM:
        with pytest.raises(ProcessLookupError):
            os.kill(benchmark, 0)
        return
    try:
        with pytest.raises(SystemExit, match="a benchmark that a killed one left"):
            quick(tmp_path, "--summarise")
    finally:
        os.kill(benchmark, signal.SIGKILL)


def test_a_summary_runs_nothing(fakes: Codes, tmp_path: Path) -> None:
    ran = fakes({"one": "", "two": ""})
    (tmp_path / "one.json").write_text('{"speed": 1.25}')
    assert run.main(["--quick", "--summarise", "--results", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["sections"]
    assert (rows["one"]["status"], rows["one"]["figures"]) == ("on disk", {"speed": 1.25})
    assert rows["two"]["status"] == "not run" and not ran


@pytest.mark.parametrize(("arguments", "said"), [
    (["--only", "nonsense"], "unknown benchmarks ['nonsense']"),
    (["--quick", "--only", "casts"], "have no quick form"),
    (["--results", "x"], "--results goes with --quick"),
])
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert said in capsys.readouterr().err


def test_the_list_says_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BENCHMARKS)


def test_one_real_benchmark_in_its_quick_form(tmp_path: Path) -> None:
    assert quick(tmp_path, "--only", "transforms") == 0
    row = json.loads((tmp_path / "summary.json").read_text())["sections"]["transforms"]
    assert row["figures"]["functions kept"] == "2 of 2"
