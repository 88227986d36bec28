"""Figures as inline SVG in the page's colours, drawn with matplotlib where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

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


@dataclasses.dataclass(frozen=True)
class Chart:
    """One drawing: an ``<svg>`` element, and what it shows."""

    svg: str
    caption: str


def matplotlib_is_installed() -> bool:
    """Whether charts can be drawn; does not import matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


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
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
