"""The difference of two reports in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaleprop.report import text
from scaleprop.report.console import stdout_console
from scaleprop.report.diff import ReportDifference, TensorDifference, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show(difference: ReportDifference, console: Console | None = None) -> None:
    """Print what differs of the whole, and of each tensor.

    Raises:
        BackendUnavailable: without rich.
    """
    console = console or stdout_console()
    if difference.summary:
        console.print(_summary(difference))
    if difference.tensors:
        console.print(_tensors(difference))
    if not difference:
        console.print("no difference")


def _summary(difference: ReportDifference) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "before", "after"):
        table.add_column(heading)
    for name, old, new in difference.summary:
        table.add_row(escape(name), escape(_plain(old)), escape(_plain(new)))
    return table


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else \
        f"{value:.6g}" if isinstance(value, float) else str(value)


def _tensors(difference: ReportDifference) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("node", "operand"):
        table.add_column(heading, overflow="fold")
    table.add_column("loss dB", justify="right")
    for heading in ("format", "SQNR dB", "bytes"):
        table.add_column(heading, overflow="fold")
    table.add_column("what else changed", overflow="fold", ratio=1)
    for one in difference.tensors:
        cells = ({"changed": "~", "added": "+", "removed": "-"}[one.change], one.node, one.operand,
                 text.decibels(one.loss_db) if one.loss_db else "",
                 *(_sides(one, name) for name in ("format", "sqnr_db", "nbytes")), _why(one))
        table.add_row(*map(escape, cells))
    return table


def _sides(one: TensorDifference, name: str) -> str:
    old, new = shown(one.before, name), shown(one.after, name)
    return old if old == new else f"{old} → {new}"


def _why(one: TensorDifference) -> str:
    """Shape, kind of scale, what it runs as, who decided and why; of one report alone, that one's.
    """
    names = [name for name in ("shape", "scale_kind", "lowering", "decided_by", "reason")
             if name in one.fields]
    if one.change == "changed":
        return "; ".join(_sides(one, name) for name in names)
    return "; ".join(filter(None, (shown(one.before or one.after, name) for name in names)))
