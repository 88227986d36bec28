"""SIGKILL at any moment of save, export, compile and sweep: outputs are whole, work is not lost.

    SCALEPROP_KILLS=100 pytest tests/storage/test_kill.py     100 moments a command, not 6

A sweep, which trains, is killed half as often.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch

import scaleprop
from scaleprop.report import Report
from tests.storage.work import COMMANDS, inputs, made
from tests.sweep.tiny import outcomes_in

KILLS = int(os.environ.get("SCALEPROP_KILLS", "6"))  # of each command
ROOT = Path(__file__).parents[2]


class Server:
    """The process that forks children which do the work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.storage.work"], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(
        self, command: str, folder: Path, kill_after: float | None = None,
        kill_at: int | None = None,
    ) -> int:
        """The child's exit status, or minus the signal that ended it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"command": command, "folder": str(folder), "log": str(self.folder / "log"),
                   "source": str(self.folder / "source"), "kill_at": kill_at,
                   "kill_after": kill_after}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @property
    def done(self) -> dict[str, Any]:
        """Of the last child that ended by itself: seconds and file operations."""
        return json.loads((self.folder / "log.done").read_text())

    def logged(self, text: str) -> int:
        """How many lines of the last child's log have ``text``."""
        return sum(text in line for line in (self.folder / "log").read_text().splitlines())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "source").mkdir()
    safetensors.torch.save_file(made(1)[0].state_dict(), folder / "source" / "m.safetensors")
    found = Server(folder)
    yield found
    found.close()


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def visible(folder: Path) -> list[str]:
    """Every name; weights have two."""
    return sorted(path.name.replace(".1.data", ".data") for path in folder.iterdir())


@dataclasses.dataclass
class Output:
    """What a command leaves in ``folder``, as something to compare; None where it left nothing."""

    folder: Path

    def save(self) -> Any:
        out = self.folder / "out"
        if not out.exists():
            return None
        scaleprop.load(out)  # compares every checksum
        return files(out)

    def compile(self) -> Any:
        if (report := self.folder / "out.json").exists():
            Report.load(report)
        return self.save()

    def export(self) -> Any:
        out = self.folder / "out.onnx"
        if not out.exists():
            return None
        session = onnxruntime.InferenceSession(str(out))
        (result,) = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})
        return result.tobytes()

    def sweep(self) -> Any:
        """Losses of the runs that are done; the table, where there is one, is whole."""
        path = self.folder / "out.sqlite"
        if not path.exists() or not path.stat().st_size:
            return None
        found = {key: outcome.losses for key, outcome in outcomes_in(path).items()
                 if outcome.status == "done"}
        if (table := self.folder / "out.csv").exists():
            header, *rows = csv.reader(table.read_text().splitlines())
            assert len(rows) == len(found) and {len(row) for row in rows} == {len(header)}
        return found

    def of(self, command: str) -> Any:
        return getattr(self, command)()


def prepared(command: str, folder: Path, older: bool) -> Any:
    """``folder`` with an older output in it, where asked for and where there is such a thing."""
    folder.mkdir()
    if not older or command == "sweep":
        return None
    compiled = made(2)[1]
    if command == "export":
        compiled.export(folder / "out.onnx", external_data=True)
    else:
        compiled.save(folder / "out")
    return Output(folder).of(command)


def finished(command: str, folder: Path) -> int:
    """How much of the work a killed process has finished, as its files say."""
    if command == "save":
        return len(list((folder / ".out.saving").glob("*.safetensors")))
    if command == "compile":
        return len(list((folder / ".out.compiling").glob("*.safetensors")))
    return len(Output(folder).sweep() or ()) if command == "sweep" else 0


def check_resumed(server: Server, command: str, before: int, total: int) -> None:
    """The last child did what was left, and no more."""
    if command == "save":
        assert server.logged("is complete already") == before
    elif command == "compile":
        assert server.logged(f"{before} weights were done already") == 1
    elif command == "sweep":
        assert server.logged("a run is performed") == total - before


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment(command: str, server: Server, tmp_path: Path) -> None:
    draw = random.Random(f"kill {command}")
    calm = tmp_path / "calm"
    calm.mkdir()
    assert server.run(command, calm) == 0
    new, names, done = Output(calm).of(command), visible(calm), server.done
    total = server.logged("a run is performed")
    kills = KILLS // 2 if command == "sweep" else KILLS
    for number in range(kills):
        folder = tmp_path / str(number)
        moment = (number + draw.random()) / kills
        status, after, at = 0, None, None
        while status == 0:  # by the clock, unless it ended first: then earlier
            shutil.rmtree(folder, ignore_errors=True)
            old = prepared(command, folder, older=number % 3 == 0)
            if number % 2:
                at = 1 + int(moment * done["operations"])  # right before a file operation
            else:
                after = moment * done["seconds"] if after is None else after / 2
            status = server.run(command, folder, after, at)
        assert status == -signal.SIGKILL
        left = Output(folder).of(command)
        if command == "sweep":
            assert left is None or left.items() <= new.items()
        else:
            assert left in (old, new)
        before = finished(command, folder) if left != new or command == "sweep" else None
        assert server.run(command, folder) == 0
        assert Output(folder).of(command) == new
        if before is not None:
            check_resumed(server, command, before, total)
        assert visible(folder) == names
        shutil.rmtree(folder)
