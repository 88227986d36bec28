"""A sweep as one HTML page: a chart whose points say what they are, and a table to sort and filter.

No request to anywhere, no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from scaleprop.report.page import number_cell, page
from scaleprop.sweeps.picture import Drawing, Mark, ticks
from scaleprop.sweeps.progress import spelled
from scaleprop.sweeps.results import Point, Sweep
from scaleprop.sweeps.tables import NUMBERS, ON_FRONT, cells, failures, front_of

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44  # margins
# the colours that paper and dark screens both bear; further groups start anew
_COLOURS = ("#3b82c4", "#d9772b", "#3f9d5a", "#c14f4f", "#8a6cc2", "#8c6d4f", "#c966a8", "#7f7f7f",
            "#a3a12b", "#2ba6b3")  # fmt: skip


def render(sweep: Sweep, shown: Drawing) -> str:
    """``sweep`` as a complete document. Every name in it is escaped."""
    base = sweep.baseline.recipe.name if sweep.baseline else ""
    title = "scaleprop: a sweep over recipes" + (f", against {base}" if base else "")
    return page(title, (_cards(sweep, shown), _chart(shown), _table(sweep), _notes(sweep)))


def _cards(sweep: Sweep, shown: Drawing) -> str:
    settings = sweep.settings
    cards = [("combinations", str(len(sweep.points)), f"{len(sweep.skipped)} skipped"),
             ("seeds", str(len(sweep.seeds)), ", ".join(map(str, sweep.seeds))),
             ("steps", str(settings.get("steps", "?")),
              f"learning rate {settings.get('learning_rate', '?')}"),
             ("model", str(settings.get("factory", "?")), str(settings.get("data", "")))]
    if sweep.baseline:
        cards.append((sweep.baseline.recipe.name, cells(sweep.baseline)[0], "loss"))
    if shown.diverged:
        cards.append(("diverged", str(shown.diverged), "not in the chart"))
    items = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}'
        f"<small>{escape(detail)}</small></dd></div>" for name, value, detail in cards)
    return f'<dl class="cards">{items}</dl>\n'


def _chart(shown: Drawing) -> str:
    if not shown.marks:
        return "<p>No combination has a finite loss and a known cost yet.</p>\n"
    x, y, frame = _frame(shown)
    colour = {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(shown.groups)}
    line = " ".join(f"{x(mark.x):.1f},{y(mark.y):.1f}" for mark in shown.front)
    best = (f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-opacity=".45"/>'
            if len(shown.front) > 1 else "")
    dots = "".join(_dot(mark, x, y, colour[mark.group]) for mark in shown.marks)
    star = ""
    if shown.baseline is not None:
        cost = 1.0 if math.isnan(shown.baseline.cost) else shown.baseline.cost
        star = (f'<text x="{x(cost):.1f}" y="{y(0) + 5:.1f}" text-anchor="middle" font-size="17" '
                f'fill="currentColor">★<title>{escape(shown.baseline.recipe.name)}</title></text>')
    legend = " ".join(f'<span style="color:{colour[group]}">●</span> {escape(group)}'
                      for group in shown.groups if group)
    caption = (f"{escape(shown.ylabel)}, ± standard error over seeds, over the "
               f"{escape(shown.xlabel)}; filled and joined: the best for their cost. "
               f"{escape(shown.color)}: {legend}")
    return (f'<div class="charts"><figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="Loss gap over cost" font-size="12">{frame}{best}{dots}{star}</svg>'
            f"<figcaption>{caption}</figcaption></figure></div>\n")


Scale = Callable[[float], float]


def _frame(shown: Drawing) -> tuple[Scale, Scale, str]:
    """Where x and y are put, and the axes as SVG."""
    xs = [mark.x for mark in shown.marks]
    ys = [mark.y + sign * mark.error for mark in shown.marks for sign in (-1, 1)]
    if shown.baseline is not None:
        xs.append(1.0 if math.isnan(shown.baseline.cost) else shown.baseline.cost)
        ys.append(0.0)
    x0, x1 = _widened(min(xs), max(xs))
    y0, y1 = _widened(min(ys), max(ys))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (value - x0) / (x1 - x0) * (right - _LEFT)

    def y(value: float) -> float:
        return bottom - (value - y0) / (y1 - y0) * (bottom - _TOP)

    across = "".join(
        f'<line x1="{_LEFT}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end" fill="currentColor">{t:g}'
        "</text>" for t in ticks(y0, y1))
    along = "".join(
        f'<text x="{x(t):.1f}" y="{bottom + 18}" text-anchor="middle" fill="currentColor">{t:g}'
        "</text>" for t in ticks(x0, x1))
    middle = (_TOP + bottom) / 2
    names = (
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle" '
        f'fill="currentColor">{escape(shown.xlabel)}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" fill="currentColor" '
        f'transform="rotate(-90 14 {middle})">{escape(shown.ylabel)}</text>')
    return x, y, across + along + names


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * ((high - low) or max(abs(low), 1.0))
    return low - margin, high + margin


def _dot(mark: Mark, x: Scale, y: Scale, colour: str) -> str:
    words = f"{mark.label}: {' · '.join(filter(None, cells(mark.point)))}"
    bar = (f'<line x1="{x(mark.x):.1f}" x2="{x(mark.x):.1f}" y1="{y(mark.y - mark.error):.1f}" '
           f'y2="{y(mark.y + mark.error):.1f}" stroke="{colour}"/>' if mark.error else "")
    fill = colour if mark.front else "none"
    return (f'<g>{bar}<circle cx="{x(mark.x):.1f}" cy="{y(mark.y):.1f}" r="5" stroke="{colour}" '
            f'fill="{fill}" pointer-events="all"><title>{escape(words)}</title></circle></g>')


def _table(sweep: Sweep) -> str:
    if not sweep.points:
        return ""
    headings = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if number else ""}'
        f' title="{escape(NUMBERS.get(name, ""))}"><button type="button">{escape(name)}</button>'
        "</th>" for name, number in (*((axis, False) for axis in sweep.axes),
                                     *((name, True) for name in NUMBERS),
                                     ("s a step", True), ("runs", False), ("best", False)))
    front = set(map(id, front_of(sweep)))
    body = "\n".join(_row(sweep, point, id(point) in front) for point in sweep.ranked())
    chosen = "".join(_selector(i, axis, sweep) for i, axis in enumerate(sweep.axes))
    return f"""<h2>Combinations</h2>
<div class="controls">
<label>Filter (press /)<input type="search" name="text" autocomplete="off"
 placeholder="words in any column"></label>
{chosen}<span id="shown" role="status">{len(sweep.points)} combinations</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Combinations">
<table id="tensors" data-noun="combinations"><thead><tr>{headings}</tr></thead><tbody>
{body}
</tbody></table></div>
"""


def _selector(place: int, axis: str, sweep: Sweep) -> str:
    values = dict.fromkeys(point.axes.get(axis, "") for point in sweep.points)
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return (f'<label>{escape(axis)}<select name="a{place}"><option value="">all</option>'
            f"{options}</select></label>\n")


def _row(sweep: Sweep, point: Point, front: bool) -> str:
    numbers = sweep.numbers(point)
    keys = ("loss", "gap", "gap_percent", "overhead", "operands", "passes", "rotations")
    marks = "".join(f' data-a{i}="{escape(point.axes.get(axis, ""))}"'
                    for i, axis in enumerate(sweep.axes))
    seconds = numbers["seconds_per_step"]
    return (f"<tr{marks}>"
            + "".join(f"<td>{escape(point.axes.get(axis, ''))}</td>" for axis in sweep.axes)
            + "".join(number_cell(shown, numbers[key])
                      for shown, key in zip(cells(point), keys, strict=True))
            + number_cell("" if seconds is None else f"{seconds:.3f}", seconds)
            + f"<td>{escape(point.status(sweep.seeds))}</td><td>{ON_FRONT if front else ''}</td>"
            "</tr>")


def _notes(sweep: Sweep) -> str:
    notes = [f"skipped, {spelled(axes)}: {reason}" for axes, reason in sweep.skipped]
    notes += failures(sweep)
    meaning = "".join(f"<li>{escape(name)}: {escape(what)}</li>" for name, what in NUMBERS.items())
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (f"<h2>Columns</h2>\n<ul>{meaning}<li>s a step: of the emulation on the machine that "
            "ran it, no measure of hardware</li></ul>\n"
            + (f"<h2>Not in the table</h2>\n<ul>{listed}</ul>\n" if notes else ""))
