"""A sweep as a table, in the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaleprop.report.console import stdout_console
from scaleprop.sweeps.progress import spelled
from scaleprop.sweeps.results import Mean, Point, Sweep

if TYPE_CHECKING:
    from rich.console import Console

ON_FRONT = "●"
_WIDE = 130  # characters that all columns need
_DETAILS = ("operands", "passes", "rotations")
# heading → what it says
NUMBERS = {
    "loss": "± standard error over seeds",
    "gap": "of the loss, to the baseline's from the same seed",
    "gap %": "of the baseline's loss",
    "cost": "modelled, of BF16's bytes and operations: less than 1 is a saving",
    "operands": "bytes of factors as products read them, of BF16's",
    "passes": "more traffic to quantize them, in readings of all factors in BF16",
    "rotations": "their work, of the products' operations",
}
EFFECTS = "What a change does to the loss, all else alike, mean ± standard error of pairs of runs"
EFFECT_COLUMNS = ("axis", "value", "against", "loss", "pairs")


def columns(sweep: Sweep) -> tuple[str, ...]:
    """Headings."""
    return (*sweep.axes, *NUMBERS, "runs", "best")


def rows(sweep: Sweep) -> list[tuple[str, ...]]:
    """Cells: the baseline, then smallest gaps first."""
    front = set(map(id, front_of(sweep)))
    every = ([sweep.baseline] if sweep.baseline else []) + sweep.ranked()
    return [(*_axes(sweep, point), *cells(point), point.status(sweep.seeds),
             ON_FRONT if id(point) in front else "") for point in every]


def front_of(sweep: Sweep) -> list[Point]:
    """The Pareto front; none where costs are not known."""
    if any(point.overhead is None for point in sweep.points):
        return []
    return sweep.pareto()


def _axes(sweep: Sweep, point: Point) -> Iterable[str]:
    if point is sweep.baseline and sweep.axes:
        return (f"{point.recipe.name} (baseline)", *("" for _ in sweep.axes[1:]))
    return (point.axes.get(axis, "") for axis in sweep.axes)


def cells(point: Point) -> tuple[str, ...]:
    """The numbers, spelled."""
    cost = point.overhead
    shares = ("", "", "", "") if cost is None else (
        f"{cost.relative:.2f}", f"{cost.operands:.2f}", f"{cost.passes:.2f}",
        f"{100 * cost.rotations:.1f}%")
    percent = point.percent
    return (_mean(point.loss, ""), _mean(point.gap, "+"),
            f"{percent:+.2f}%" if math.isfinite(percent) else "", *shares)


def _mean(mean: Mean, sign: str) -> str:
    if mean.count == 0:
        return ""
    if not math.isfinite(mean.value):
        return "diverged"
    shown = f"{mean.value:{sign}.4f}"
    return shown if math.isnan(mean.error) else f"{shown} ± {mean.error:.4f}"


def effect_rows(
    sweep: Sweep, within: Mapping[str, str] | None = None
) -> list[tuple[str, ...]]:
    """Cells of ``EFFECT_COLUMNS``, a row for every value that was compared; see
    ``Sweep.effects``."""
    found: list[tuple[str, ...]] = []
    for each in sweep.effects(within):
        mean, lost = each.percent, f", {each.diverged} diverged" * bool(each.diverged)
        change = f"{mean.value:+.2f}%" if mean.count else ""
        if mean.count > 1:
            change += f" ± {mean.error:.2f}"
        if mean.count or each.diverged:
            found.append((each.axis, each.value, each.against, change, f"{mean.count}{lost}"))
    return found


def markdown(sweep: Sweep) -> str:
    """The table, what its columns are, and what was skipped."""
    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |\n"

    headings = columns(sweep)
    ruler = "|" + "".join("---:|" if name in NUMBERS else "---|" for name in headings) + "\n"
    text = line(headings) + ruler + "".join(map(line, rows(sweep)))
    if changes := effect_rows(sweep):
        text += (f"\n{EFFECTS}:\n\n" + line(EFFECT_COLUMNS) + "|---|---|---|---:|---:|\n"
                 + "".join(map(line, changes)))
    return text + _skipped(sweep)


def _skipped(sweep: Sweep) -> str:
    if not sweep.skipped:
        return ""
    items = "".join(f"- {spelled(axes)}: {reason}\n" for axes, reason in sweep.skipped)
    return f"\nSkipped, as no valid recipe:\n\n{items}"


def show(sweep: Sweep, console: Console | None = None) -> None:
    """Print ``sweep``.

    Raises:
        BackendUnavailable: without rich.
    """
    console = console or stdout_console()
    narrow = console.width < _WIDE
    console.print(_table(sweep, _DETAILS if narrow else ()))
    if narrow:
        console.print(f"{', '.join(_DETAILS)}: with {_WIDE} columns, or in a file", style="dim")
    if changes := effect_rows(sweep):
        console.print(_plain_table(EFFECTS, EFFECT_COLUMNS, changes))
    for axes, reason in sweep.skipped:
        console.print(f"skipped, {spelled(axes)}: {reason}", markup=False, highlight=False)
    for line in failures(sweep):
        console.print(line, markup=False, highlight=False)


def failures(sweep: Sweep) -> list[str]:
    """A line for each error, however many runs had it."""
    found: dict[str, list[str]] = {}
    for point, seed, error in sweep.errors():
        last = error.strip().splitlines()[-1]
        found.setdefault(last, []).append(f"{spelled(point.axes)}, seed {seed}")
    return [f"failed, {runs[0]}{f' and {len(runs) - 1} more' if len(runs) > 1 else ''}: {error}"
            for error, runs in found.items()]


def _plain_table(title: str, headings: Sequence[str], body: Iterable[Sequence[str]]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in headings:
        table.add_column(name, justify="right" if name in ("loss", "pairs") else "left")
    for cells_ in body:
        table.add_row(*map(escape, cells_))
    return table


def _table(sweep: Sweep, without: Sequence[str]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = columns(sweep)
    shown = [place for place, name in enumerate(headings) if name not in without]
    for place in shown:
        name, is_axis = headings[place], place < len(sweep.axes)
        table.add_column(escape(name), justify="right" if name in NUMBERS else "left",
                         overflow="fold", no_wrap=not is_axis)
    for cells_ in rows(sweep):
        table.add_row(*(escape(cells_[place]) for place in shown),
                      style="bold" if cells_[-1] else "")
    return table
