"""The transforms of a report, and the trials that chose them: in the terminal and on its page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from scaleprop.report import text
from scaleprop.report.page import simple_table
from scaleprop.report.records import TransformRecord, TrialRecord

if TYPE_CHECKING:
    from rich.table import Table

_NAMED = 3  # parameters that a row names
_TERMINAL = 24  # rows of a table in the terminal
TRANSFORM_COLUMNS = ("transform", "of", "values", "absorbed by", "before → after",
                     "at run time, or why not", "source")  # fmt: skip
TRIAL_COLUMNS = ("chain", "error of the outputs", "of each operator", "took it", "seconds", "")
Rows = Sequence[tuple[str, ...]]


def transform_row(record: TransformRecord) -> tuple[str, ...]:
    """The cells of ``TRANSFORM_COLUMNS``."""
    unnamed = len(record.absorbed) - _NAMED
    absorbed = ", ".join(record.absorbed[:_NAMED]) + (f" and {unnamed} more" if unnamed > 0 else "")
    outcome = f"refused: {record.refused}" if record.refused else "; ".join(record.runtime)
    measured = "; ".join(
        f"{name} {text.digits(value)} → {text.digits(record.after.get(name))}"
        for name, value in record.before.items() if name in record.after)
    return (f"{record.by} ({record.kind})", record.seed, str(record.members or ""), absorbed,
            measured, outcome, text.short_place(record.source))


def trial_row(trial: TrialRecord) -> tuple[str, ...]:
    """The cells of ``TRIAL_COLUMNS``."""
    return (trial.chain or "rounding alone", f"{trial.error:.4g}", f"{trial.local_error:.4g}",
            f"{len(trial.operators)} operators" if trial.operators else "",
            f"{trial.seconds:.1f}", "chosen" if trial.chosen else "")


def tables(transforms: Sequence[TransformRecord], trials: Sequence[TrialRecord]) -> list[Table]:
    """What the terminal shows."""
    shown: list[Table] = []
    for columns, rows, what in _parts(transforms, trials):
        if rows:
            shown.append(_table(columns, rows, what))
    return shown


def section(transforms: Sequence[TransformRecord], trials: Sequence[TrialRecord]) -> str:
    """What the page shows; "" where nothing was transformed."""
    return "".join(f"<h3>{escape(what.capitalize())}</h3>\n{simple_table(what, columns, rows)}"
                   for columns, rows, what in _parts(transforms, trials) if rows)


def _parts(
    transforms: Sequence[TransformRecord], trials: Sequence[TrialRecord]
) -> tuple[tuple[tuple[str, ...], Rows, str], ...]:
    return ((TRIAL_COLUMNS, [trial_row(trial) for trial in trials], "chains tried"),
            (TRANSFORM_COLUMNS, [transform_row(record) for record in transforms], "transforms"))


def _table(columns: tuple[str, ...], rows: Rows, what: str) -> Table:
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows[:_TERMINAL]:
        table.add_row(*map(plain, row))
    if len(rows) > _TERMINAL:
        table.caption = f"and {len(rows) - _TERMINAL} more {what}: save the report to see them"
    return table
