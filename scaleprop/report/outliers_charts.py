"""Charts of outliers: channel profiles, kurtosis, difficulty, and where attention sinks.

At most ``_KINDS`` + 3 drawings of the worst few tensors each, so that a page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scaleprop.report.charts import (
    ACTIVATION,
    INK,
    OTHER,
    WEIGHT,
    Chart,
    new_figure,
    shorten,
    to_svg,
)
from scaleprop.report.outliers import AttentionProfile, OutlierTable, Profile, worst_first

_KINDS = 3  # kinds of layers with a picture of channels
_CURVES = 3  # tensors whose sorted channels it shows
_BARS = 12  # tensors that a bar chart shows
_ROWS, _COLUMNS = 8, 32  # attentions and keys of the sink map
_SHADES = 24


def charts(table: OutlierTable) -> list[Chart]:
    """The charts that ``table`` has data for; matplotlib must be installed."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        drawn = [_channels(kind, profiles) for kind, profiles in _by_kind(table.profiles)]
        for draw in (_kurtosis, _difficulty):
            drawn += [chart] if (chart := draw(table.profiles)) else []
        return drawn + ([chart] if (chart := _sinks(table.attention)) else [])


def _by_kind(profiles: Sequence[Profile]) -> list[tuple[str, list[Profile]]]:
    found: dict[str, list[Profile]] = {}
    for profile in worst_first(profiles):
        if any(profile.amax):
            found.setdefault(profile.layer, []).append(profile)
    return list(found.items())[:_KINDS]


def _channels(kind: str, profiles: Sequence[Profile]) -> Chart:
    figure, (left, right) = new_figure(2.8, columns=2)
    for profile, colour in zip(profiles[:_CURVES], (ACTIVATION, WEIGHT, OTHER), strict=False):
        values = sorted(profile.amax, reverse=True)
        places = [100 * (i + 0.5) / len(values) for i in range(len(values))]
        left.plot(places, values, color=colour, linewidth=1.4, label=shorten(profile.node, 24))
    _logarithmic(left.yaxis)
    left.set_xlabel("channels, largest first, %")
    left.set_ylabel("largest magnitude")
    left.legend(frameon=False, fontsize=7, labelcolor=INK)
    worst = profiles[0]
    run = math.ceil(worst.channels / len(worst.amax))
    places = [i * run for i in range(len(worst.amax))]
    right.fill_between(places, worst.amax, step="mid", color=OTHER, linewidth=0)
    marked = [channel for channel in worst.outliers if channel // run < len(worst.amax)]
    right.plot(marked, [worst.amax[channel // run] for channel in marked], "o",
               color=ACTIVATION, markersize=3.5)
    right.set_ylim(bottom=0)
    right.set_xlabel(f"channel of {shorten(worst.node, 24)}")
    caption = (f"Channel magnitudes before {kind} operators: the {min(_CURVES, len(profiles))} "
               f"most difficult, sorted; by channel, with {len(worst.outliers)} outliers marked.")
    return Chart(to_svg(figure, f"Channel magnitudes, {kind}"), caption)


def _bars(names: Sequence[str], xlabel: str) -> tuple[Any, Any]:
    figure, axes = new_figure(0.9 + 0.24 * max(len(names), 3))
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set_ylim(-0.7, max(len(names), 3) - 0.3)
    axes.set_xlabel(xlabel)
    return figure, axes


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers: powers would be set as formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any) -> None:
    axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)


def _kurtosis(profiles: Sequence[Profile]) -> Chart | None:
    shown = [p for p in worst_first(profiles, "kurtosis") if math.isfinite(p.kurtosis)]
    shown = shown[:_BARS][::-1]
    if not shown:
        return None
    figure, axes = _bars([p.node for p in shown], "kurtosis; 3 is a Gaussian's")
    places = range(len(shown))
    axes.barh(places, [p.kurtosis for p in shown], height=0.6, color=ACTIVATION, label="tensor")
    axes.plot([p.channel_kurtosis for p in shown], places, "o", color=INK, markersize=3.5,
              label="mean of its channels")
    _logarithmic(axes.xaxis)
    axes.axvline(3, color=OTHER, linewidth=0.8, linestyle=":")
    _legend(axes)
    return Chart(to_svg(figure, "Kurtosis"), f"Kurtosis of the {len(shown)} activations with the "
                 "heaviest tails. Far above its channels': the channels differ in size.")


def _difficulty(profiles: Sequence[Profile]) -> Chart | None:
    shown = [p for p in worst_first(profiles) if math.isfinite(p.relative_difficulty)]
    shown = shown[:_BARS][::-1]
    if not shown:
        return None
    figure, axes = _bars([p.node for p in shown], "relative quantization difficulty")
    compared = [p for p in shown if p.relative_after is not None]
    height = 0.36 if compared else 0.6
    places = list(range(len(shown)))
    axes.barh([i + height / 2 if compared else i for i in places],
              [p.relative_difficulty for p in shown], height=height, color=ACTIVATION,
              label="before")
    if compared:
        axes.barh([i - height / 2 for i in places], [p.relative_after or 0.0 for p in shown],
                  height=height, color=WEIGHT, label="after")
        _legend(axes)
    return Chart(to_svg(figure, "Quantization difficulty"), "Spread of the channel magnitudes over "
                 f"their mean, of the {len(shown)} most difficult activations; lower is easier.")


def _sinks(attention: Sequence[AttentionProfile]) -> Chart | None:
    shown = sorted((a for a in attention if a.received), key=lambda a: -max(a.received))[:_ROWS]
    if not shown:
        return None
    from matplotlib import colormaps

    longest = max(a.keys for a in shown)
    width = min(longest, _COLUMNS)
    cells = [cells_of(a, longest, width) for a in shown]
    figure, axes = new_figure(0.9 + 0.26 * max(len(cells), 3))
    edges = [longest * i / width for i in range(width + 1)]
    drawn = axes.pcolormesh(edges, range(len(cells) + 1), cells, vmin=0, vmax=max(map(max, cells)),
                            cmap=colormaps["magma"].resampled(_SHADES))
    axes.set_yticks([i + 0.5 for i in range(len(cells))], [shorten(a.node) for a in shown])
    axes.set_xlabel("key position")
    bar = figure.colorbar(drawn, ax=axes, pad=0.01)
    bar.solids.set_rasterized(False)  # an image inside would be refused by the page's policy
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return Chart(to_svg(figure, "Attention received"), "Share of all attention that each key "
                 "receives, mean over sequences, heads and queries: a bright column is a sink.")


def cells_of(profile: AttentionProfile, longest: int, width: int) -> list[float]:
    """The largest share in each of ``width`` equal parts of ``longest`` positions."""
    cells = [0.0] * width
    run = math.ceil(profile.keys / len(profile.received))
    for index, share in enumerate(profile.received):
        column = index * run * width // longest
        cells[column] = max(cells[column], share)
    return cells
