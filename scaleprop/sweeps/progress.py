"""How far a sweep is, live on standard error, where rich is installed and somebody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Protocol

from scaleprop.sweeps.runs import Outcome, Task


class Watch(Protocol):
    """What hears of runs."""

    def step(self, task: Task, steps: int, loss: float) -> None:
        """A run in this process has made so many steps."""

    def finished(self, task: Task, outcome: Outcome) -> None:
        """A run has ended."""


class _Nobody:
    def step(self, task: Task, steps: int, loss: float) -> None:
        pass

    def finished(self, task: Task, outcome: Outcome) -> None:
        pass


class _Bars:
    """One bar of runs, one of the steps of the run in this process, and a line on each."""

    def __init__(self, bars: Any, lines: Any, total: int, steps: int) -> None:
        self._bars, self._lines, self._steps = bars, lines, steps
        self._failed = self._diverged = 0
        self._runs = bars.add_task("runs", total=total)
        self._one: Any = None
        self._key = ""

    def step(self, task: Task, steps: int, loss: float) -> None:
        if self._one is None:
            self._one = self._bars.add_task("steps", total=self._steps)
        if self._key != task.key:
            self._key = task.key
            self._bars.reset(self._one)
        self._bars.update(self._one, completed=steps)
        self._lines[1] = f"now:  {_run(task)}: loss {loss:.4f}"

    def finished(self, task: Task, outcome: Outcome) -> None:
        self._failed += outcome.status == "failed"
        self._diverged += outcome.status == "diverged"
        bad = "".join(f"; {count} {what}" for count, what in (
            (self._diverged, "diverged"), (self._failed, "failed")) if count)
        how = f"loss {outcome.loss:.4f}" if outcome.status == "done" else outcome.status
        self._bars.update(self._runs, advance=1)
        self._lines[0] = f"last: {_run(task)}: {how}{bad}"


def _run(task: Task) -> str:
    """The labels alone: the axes are in the table."""
    return f"{' · '.join(task.axes.values()) or 'baseline'} · seed {task.seed}"


class _Lines(list[str]):
    """Lines below the bars, cut where the terminal ends."""

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text("\n".join(filter(None, self)), style="dim", no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def watching(enabled: bool, total: int, steps: int) -> Generator[Watch]:
    """Bars of ``total`` runs of ``steps`` each; nothing where disabled, without rich, or where
    standard error is no terminal."""
    if not enabled:
        yield _Nobody()
        return
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield _Nobody()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Nobody()
        return
    bars = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                    MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                    console=console)
    lines = _Lines(["", ""])
    with Live(Group(bars, lines), console=console, transient=True, refresh_per_second=4):
        yield _Bars(bars, lines, total, steps)


def spelled(axes: Mapping[str, str]) -> str:
    """``dgrad.dy.rounding=nearest, high=head``; the baseline has no axes."""
    return ", ".join(f"{axis}={label}" for axis, label in axes.items()) or "baseline"
