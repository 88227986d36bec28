"""Gaps over costs as a picture: SVG or PNG by matplotlib, or one HTML page with the table."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.report.files import write_bytes, write_text
from scaleprop.sweeps.progress import spelled
from scaleprop.sweeps.results import Point, Sweep
from scaleprop.sweeps.tables import front_of

SUFFIXES = (".svg", ".png", ".html")
_INCHES = (7.2, 4.4)


@dataclasses.dataclass(frozen=True)
class Mark:
    """One point: error is 0 of one seed; group: its value of the axis that has the colours."""

    point: Point
    x: float
    y: float
    error: float
    group: str
    front: bool
    label: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What a picture shows. color: the axis; diverged: how many points have no place in it."""

    marks: tuple[Mark, ...]
    front: tuple[Mark, ...]
    groups: tuple[str, ...]
    color: str
    ylabel: str
    xlabel: str
    baseline: Point | None
    diverged: int


def drawing(sweep: Sweep, color: str | None) -> Drawing:
    """The marks of a sweep; against gaps in per cent where there is a baseline.

    Raises:
        ConfigError: for an axis that there is not.
    """
    if color is not None and color not in sweep.axes:
        raise ConfigError(f"no axis {color!r} to colour by; there are: {', '.join(sweep.axes)}")
    chosen = color or next(iter(sweep.axes), "")
    front = set(map(id, front_of(sweep)))
    marks: list[Mark] = []
    for point in sweep.points:
        x, y, error = _place(sweep, point)
        if math.isfinite(x) and math.isfinite(y):
            marks.append(Mark(point, x, y, error, point.axes.get(chosen, ""), id(point) in front,
                              spelled(point.axes)))
    best = sorted((mark for mark in marks if mark.front), key=lambda mark: (mark.x, mark.y))
    base = sweep.baseline
    return Drawing(
        tuple(marks), tuple(best), tuple(dict.fromkeys(mark.group for mark in marks)), chosen,
        f"loss, more than {base.recipe.name}'s, %" if base else "loss",
        "modelled cost of linear layers, of BF16's", base,
        sum(math.isinf(sweep.merit(point)) for point in sweep.points))


def _place(sweep: Sweep, point: Point) -> tuple[float, float, float]:
    """x, y and y's standard error; x is 1 where costs are not known."""
    cost = 1.0 if point.overhead is None else point.cost
    if sweep.baseline is None:
        mean, value, unit = point.loss, point.loss.value, 1.0
    else:
        mean, value = point.gap, point.percent
        unit = abs(value / mean.value) if mean.value else 0.0
    return cost, value, 0.0 if math.isnan(mean.error) else mean.error * unit


def check_drawable(path: str | os.PathLike[str]) -> str:
    """The suffix of ``path``; raises what ``Sweep.plot`` raises for it."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"a sweep is drawn as {', '.join(SUFFIXES)}, not as {str(path)!r}")
    if suffix != ".html":
        _matplotlib()
    return suffix


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise BackendUnavailable(f"pictures are drawn with matplotlib: "
                                 f"{install_command('matplotlib')}; an .html page does without"
                                 ) from error
    return mpl


def plot(sweep: Sweep, path: str | os.PathLike[str], color: str | None) -> None:
    """See ``Sweep.plot``."""
    suffix = check_drawable(path)
    shown = drawing(sweep, color)
    if suffix == ".html":
        from scaleprop.sweeps.page import render

        write_text(path, render(sweep, shown))
        return
    write_bytes(path, _picture(shown, suffix.removeprefix(".")))


def _picture(shown: Drawing, kind: str) -> bytes:
    mpl = _matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    buffer = io.BytesIO()
    # text stays text, a dollar sign is no mathematics, and ids are the same every time
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False,
                         "svg.hashsalt": "scaleprop"}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        _draw(figure.subplots(), shown)
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _draw(axes: Any, shown: Drawing) -> None:
    for place, group in enumerate(shown.groups):
        mine = [mark for mark in shown.marks if mark.group == group]
        axes.errorbar([mark.x for mark in mine], [mark.y for mark in mine],
                      yerr=[mark.error for mark in mine], fmt="o", markersize=4.5, elinewidth=0.8,
                      color=f"C{place % 10}", label=group or None)
    axes.plot([mark.x for mark in shown.front], [mark.y for mark in shown.front], color="0.4",
              linewidth=1, zorder=0, label="best for the cost")
    base = shown.baseline
    if base is not None:
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.plot([1.0 if math.isnan(base.cost) else base.cost], [0], "k*", markersize=9,
                  label=base.recipe.name)
    axes.set(xlabel=shown.xlabel, ylabel=shown.ylabel)
    if shown.diverged:
        axes.set_title(f"{shown.diverged} diverged", fontsize=9, loc="right")
    axes.legend(title=shown.color or None, fontsize=8, title_fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def ticks(low: float, high: float, wanted: int = 6) -> Sequence[float]:
    """Round numbers within [low, high], about ``wanted`` of them."""
    span = (high - low) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
