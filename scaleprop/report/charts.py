"""Charts of a report as inline SVG, drawn with matplotlib where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaleprop.report import text
from scaleprop.report.records import TensorRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for the page's own, so that a chart follows light and dark.
_COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--weight)",
    "#010205": "var(--activation)",
    "#010206": "var(--other)",
    "#010207": "var(--line)",
}
INK, WEIGHT, ACTIVATION, OTHER, LINE = _COLOURS
_NAMED = 4  # how many of the worst tensors a chart names


@dataclasses.dataclass(frozen=True)
class Chart:
    """One drawing: an ``<svg>`` element, and what it shows."""

    svg: str
    caption: str


def matplotlib_is_installed() -> bool:
    """Whether charts can be drawn; does not import matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def charts(records: Sequence[TensorRecord]) -> list[Chart]:
    """The charts that ``records`` have data for; none without matplotlib."""
    if not matplotlib_is_installed():
        return []
    import matplotlib as mpl

    # text stays text; and a dollar sign in a name is not mathematics
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        return _draw(records)


def _draw(records: Sequence[TensorRecord]) -> list[Chart]:
    drawn: list[Chart] = []
    measured = [(i, r) for i, r in enumerate(records) if _finite(r.sqnr_db)]
    if measured:
        drawn.append(Chart(_sqnr(measured), "SQNR of each tensor, in graph order; higher is "
                           f"better. The {min(_NAMED, len(measured))} lowest are numbered."))
    if any(record.nbytes for record in records):
        drawn.append(Chart(_bytes(records), "Stored bytes by format."))
    return drawn


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _sqnr(measured: Sequence[tuple[int, TensorRecord]]) -> str:
    figure, axes = new_figure(3.2)
    for label, colour, kinds in (
        ("weights", WEIGHT, {"weight"}),
        ("activations", ACTIVATION, {"static", "dynamic"}),
        ("other", OTHER, {None}),
    ):
        points = [(i, r.sqnr_db) for i, r in measured if r.scale_kind in kinds]
        if points:
            places, values = zip(*points, strict=True)
            axes.vlines(places, 0, values, color=colour, linewidth=0.8, alpha=0.45)
            axes.plot(places, values, "o", color=colour, markersize=3.5, label=label)
    worst = sorted(measured, key=lambda item: item[1].sqnr_db or 0.0)[:_NAMED]
    for rank, (place, record) in enumerate(worst):
        number, value = str(rank + 1), record.sqnr_db or 0.0
        axes.annotate(number, (place, value), xytext=(0, -10), textcoords="offset points",
                      fontsize=8, fontweight="bold", ha="center", color=INK)
        axes.text(0.995, 0.98 - 0.085 * rank,
                  f"{number}  {shorten(record.node)}, {record.operand}: {text.decibels(value)}",
                  transform=axes.transAxes, fontsize=8, ha="right", va="top", color=INK)
    axes.set_ylim(bottom=min(0.0, *(r.sqnr_db or 0.0 for _, r in measured)))
    axes.set_ylim(top=axes.get_ylim()[1] * (1.15 + 0.09 * len(worst)))  # room for the names
    axes.set_ylabel("SQNR in dB")
    axes.set_xlabel("tensor")
    axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=INK, ncols=3)
    return to_svg(figure, "SQNR of each tensor")


def _bytes(records: Sequence[TensorRecord]) -> str:
    totals: Counter[str] = Counter()
    for record in records:
        if record.nbytes:
            totals[record.format or text.HIGH] += record.nbytes
    names, counts = zip(*reversed(totals.most_common()), strict=True)
    figure, axes = new_figure(0.9 + 0.32 * max(len(names), 3))
    bars = axes.barh(
        range(len(names)), counts, height=0.6,
        color=[OTHER if name == text.HIGH else WEIGHT for name in names],
    )
    axes.bar_label(bars, [text.megabytes(n) for n in counts], padding=4, fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.margins(x=0.15)
    axes.set_ylim(-0.6, max(len(names), 3) - 0.4)  # one bar is not a poster
    axes.spines[["bottom"]].set_visible(False)
    return to_svg(figure, "Stored bytes by format")


def shorten(name: str, length: int = 36) -> str:
    """The end of a name that is longer than ``length``."""
    return name if len(name) <= length else "…" + name[1 - length :]


def new_figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of the page's width in the page's colours, and its axes: several in an array."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    figure = Figure(figsize=(7.2, height), layout="constrained")
    drawn = figure.subplots(1, columns)
    for axes in [drawn] if columns == 1 else drawn:
        _colour(axes)
    return figure, drawn


def _colour(axes: Axes) -> None:
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)
    for side, spine in axes.spines.items():
        spine.set(color=LINE, visible=side in ("left", "bottom"))


def to_svg(figure: Any, label: str) -> str:
    """``figure`` as an ``<svg>`` element: no header, no metadata, the page's colours."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):  # the same ids every time
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    for stand_in, colour in _COLOURS.items():
        drawing = drawing.replace(stand_in, colour)
    salt = re.sub(r"\W", "-", label)  # ids must not collide with another chart's
    drawing = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{salt}-", drawing)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
