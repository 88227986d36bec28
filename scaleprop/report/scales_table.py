"""A scale report in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from scaleprop.report import text
from scaleprop.report.console import stdout_console
from scaleprop.report.listing import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from scaleprop.report.scales import ScaleReport, TensorScale


def show(report: ScaleReport, console: Console | None = None) -> None:
    """Print ``report``: a summary, then one row per tensor.

    Raises:
        BackendUnavailable: without rich.
    """
    console = console or stdout_console()
    console.print(_summary(report))
    if report.tensors:
        console.print(_table(report))


def _summary(report: ScaleReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in summary_rows(report):
        grid.add_row(name, escape(value))
    return grid


def summary_rows(report: ScaleReport) -> list[tuple[str, str]]:
    """The head of the report, as (what, value) pairs."""
    counts = ((len(report.of_phase("forward")), "forward"),
              (len(report.of_phase("backward")), "backward"),
              (len(report.of_phase("parameter")), "parameters"))
    rows = [("model", report.model), ("tensors", ", ".join(f"{n} {what}" for n, what in counts))]
    phases: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    for phase in phases:
        near, good = report.near_one(phase), report.predicted_within(phase)
        said = [f"{_percent(near)} of products' operands have RMS in [1/8, 8]" if near is not None
                else "", f"{_percent(good)} of RMS predicted to within 2×" if good is not None
                else ""]
        rows.append((phase, "; ".join(filter(None, said)) or "nothing"))
    rows += [(f"in {name}, no scale", f"{under} tensors would underflow, {over} overflow")
             for name, (under, over) in report.lost().items() if under or over]
    rows += [(f"{'! ' if finding.warning else ''}{finding.name}",
              finding.message + (f". {finding.advice}" if finding.warning else ""))
             for finding in report.findings]
    rows += [("no prediction", f"{count} × {op}") for op, count in report.unknown.items()]
    rows += [("note", note) for note in report.notes]
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


COLUMNS = (  # heading, whether it holds numbers
    ("node", False), ("operator", False), ("phase", False), ("shape", False), ("where", False),
    ("RMS", True), ("predicted", True), ("ratio", True), ("amax", True), ("mean", True),
    ("kurtosis", True), ("zeros %", True), ("lost without a scale: ↓ below, ↑ above", False),
)


def cells(tensor: TensorScale) -> tuple[str, ...]:
    """One row, in the order of ``COLUMNS``."""
    return (
        tensor.node, short_op(tensor.op), tensor.phase,
        "×".join(map(str, tensor.shape)) or "scalar",
        tensor.name or tensor.module or text.short_place(tensor.source),
        size(tensor.rms), "?" if tensor.predicted is None else size(tensor.predicted),
        "" if tensor.ratio is None else f"{tensor.ratio:.2f}", size(tensor.amax),
        size(tensor.mean), "" if tensor.kurtosis is None else f"{tensor.kurtosis:.1f}",
        text.percent(tensor.zeros), ", ".join(tensor.flags),
    )


def short_op(op: str) -> str:
    """``aten.mm.default`` → ``mm``."""
    return op.removeprefix("aten.").removesuffix(".default")


def _table(report: ScaleReport) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, number in COLUMNS:
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for tensor in report.tensors:
        table.add_row(*map(escape, cells(tensor)))
    return table
