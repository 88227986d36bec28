"""The report as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaleprop.report import text, transforms_table
from scaleprop.report.console import stdout_console
from scaleprop.report.outliers_table import tables

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from scaleprop.report.records import Variant
    from scaleprop.report.report import Report


def show(report: Report, console: Console | None = None) -> None:
    """Print ``report``: a summary, outliers and transforms where there are any, one row per tensor.

    Raises:
        BackendUnavailable: without rich.
    """
    console = console or stdout_console()
    console.print(_summary(report))
    for table in tables(report.outliers) if report.outliers is not None else ():
        console.print(table)
    for table in transforms_table.tables(report.transforms, report.trials):
        console.print(table)
    if report.records:
        console.print(_table(report))


def _summary(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in summary_rows(report):
        grid.add_row(name, escape(value))
    return grid


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """The head of the report, as (what, value) pairs."""
    rows = [
        ("recipe", report.recipe or "none (analysis)"),
        ("backend", report.backend or "none"),
    ]
    if report.size_ratio is not None:
        rows.append(
            ("size", f"{text.megabytes(report.nbytes_before)} → "
                     f"{text.megabytes(report.nbytes_after)} ({report.size_ratio:.3f}×)")
        )
    rows.append(("quantized" if report.recipe else "compared", f"tensors: {report.tally}"))
    rows += [(name, f"{value:.6g}") for name, value in report.fidelity.items()]
    rows += [(f"as {one.recipe}", _variant(one)) for one in report.variants]
    rows += [
        ("stayed high", f"{count} × {op}: {reason}") for op, reason, count in report.reasons()
    ]
    rows += [("note", note) for note in report.notes]
    return rows


def _variant(one: Variant) -> str:
    """Size, speed and fidelity of one of several recipes."""
    ratio = "" if one.size_ratio is None else f" ({one.size_ratio:.3f}×)"
    speed = "" if one.speed is None else f", {one.speed:.2f}× as fast"
    fidelity = "".join(f", {name} {value:.6g}" for name, value in one.fidelity.items())
    return f"{text.megabytes(one.nbytes)}{ratio}{speed}{fidelity}"


def _table(report: Report) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("operator", overflow="fold")
    table.add_column("operand", overflow="fold")
    table.add_column("format", overflow="fold")
    table.add_column("scale")
    for heading in ("SQNR dB", "sat %", "under %"):
        table.add_column(heading, justify="right")
    table.add_column("runs as, or why not", overflow="fold", ratio=1)
    table.add_column("decided by", overflow="fold")
    previous = None
    for record in report.records:
        node = (record.node, record.op)
        named = node if node != previous else ("", "")  # name a node once
        previous = node
        cells = (
            *named, record.operand, record.format or text.HIGH, record.scale_kind or "",
            text.decibels(record.sqnr_db), text.percent(record.saturated),
            text.percent(record.underflowed), text.outcome(record), record.decided_by,
        )
        table.add_row(*map(escape, cells), style="dim" if record.format is None else "")
    return table

