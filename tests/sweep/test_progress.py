"""Progress goes to a terminal's standard error, and nowhere else."""

from __future__ import annotations

import math
import re
import sys

import pytest

from scaleprop.sweeps.progress import watching
from scaleprop.sweeps.runs import Outcome, Task
from tests.sweep.tiny import BASE

TASK = Task("k", {"*.format": "mxfp4 [bold]", "high": "none"}, BASE, 3)


def watched(enabled: bool) -> None:
    with watching(enabled, 4, 10) as watch:
        watch.step(TASK, 7, 2.5)
        watch.finished(TASK, Outcome("done", (2.25,)))
        watch.finished(TASK, Outcome("failed", error="x"))
        watch.finished(TASK, Outcome("diverged", (math.nan,)))


def test_a_terminal_sees_runs_and_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    watched(True)
    captured = capsys.readouterr()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.err)
    assert captured.out == ""
    assert re.search(r"runs.* 3/4 ", shown) and re.search(r"steps.* 7/10 ", shown)
    assert "last: mxfp4 [bold] · none · seed 3: diverged; 1 diverged; 1 failed" in shown
    assert "now:  mxfp4 [bold] · none · seed 3: loss 2.5000" in shown


@pytest.mark.parametrize("enabled", [True, False])
def test_nobody_else_sees_anything(enabled: bool, capsys: pytest.CaptureFixture[str]):
    watched(enabled)
    assert capsys.readouterr() == ("", "")


def test_without_rich_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    watched(True)
    assert capsys.readouterr() == ("", "")
