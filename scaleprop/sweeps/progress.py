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
    """One bar of runs, and one of the steps of the run in this process."""

    def __init__(self, bars: Any, total: int, steps: int) -> None:
        self._bars, self._steps = bars, steps
        self._failed = self._diverged = 0
        self._runs = bars.add_task("runs", total=total, note="")
        self._one: Any = None
        self._key = ""

    def step(self, task: Task, steps: int, loss: float) -> None:
        from rich.markup import escape

        if self._one is None:
            self._one = self._bars.add_task("steps", total=self._steps, note="")
        if self._key != task.key:
            self._key = task.key
            self._bars.reset(self._one)
        note = escape(f"{spelled(task.axes)} seed {task.seed}: loss {loss:.4f}")
        self._bars.update(self._one, completed=steps, note=note)

    def finished(self, task: Task, outcome: Outcome) -> None:
        from rich.markup import escape

        self._failed += outcome.status == "failed"
        self._diverged += outcome.status == "diverged"
        bad = "".join(f", {count} {what}" for count, what in (
            (self._diverged, "diverged"), (self._failed, "failed")) if count)
        note = f"{spelled(task.axes)} seed {task.seed}: {outcome.status}"
        if outcome.status == "done":
            note += f", loss {outcome.loss:.4f}"
        self._bars.update(self._runs, advance=1, note=escape(note + bad))


@contextlib.contextmanager
def watching(enabled: bool, total: int, steps: int) -> Generator[Watch]:
    """Bars of ``total`` runs of ``steps`` each; nothing where disabled, without rich, or where
    standard error is no terminal."""
    if not enabled:
        yield _Nobody()
        return
    try:
        from rich.console import Console
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
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars, total, steps)


def spelled(axes: Mapping[str, str]) -> str:
    """``dgrad.dy.rounding=nearest, high=head``; the baseline has no axes."""
    return ", ".join(f"{axis}={label}" for axis, label in axes.items()) or "baseline"
