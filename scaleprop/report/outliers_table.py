"""The outliers of a report in the terminal and on its page, in rows that both show."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from scaleprop.extras import install_command
from scaleprop.report import text
from scaleprop.report.charts import matplotlib_is_installed
from scaleprop.report.outliers import Outlier, OutlierTable, Profile, worst_first
from scaleprop.report.page import simple_table

if TYPE_CHECKING:
    from rich.table import Table

_NAMED = 4  # indices that a row names
_TERMINAL, _PAGE = 16, 60  # rows of each table
OUTLIER_COLUMNS = ("outliers", "where", "indices (size, share)", "detail", "source")
PROFILE_COLUMNS = ("activation", "read by", "channels", "kurtosis", "of channels", "difficulty",
                   "relative", "after", "relative after")  # fmt: skip


def outlier_row(outlier: Outlier) -> tuple[str, ...]:
    """The cells of ``OUTLIER_COLUMNS``."""
    named = ", ".join(
        f"{index} ({size:.3g}×, {text.percent(share)}%)" for index, size, share in
        zip(outlier.indices[:_NAMED], outlier.sizes, outlier.shares, strict=False))
    unnamed = outlier.count - min(_NAMED, len(outlier.indices))
    more = f" and {unnamed} more" if unnamed > 0 else ""
    return (outlier.kind, f"{outlier.node} ({outlier.op})", named + more, outlier.detail,
            text.short_place(outlier.source))


def profile_row(profile: Profile) -> tuple[str, ...]:
    """The cells of ``PROFILE_COLUMNS``."""
    return (profile.node, f"{profile.layer} {profile.reader}", str(profile.channels),
            *map(number, (profile.kurtosis, profile.channel_kurtosis, profile.difficulty,
                          profile.relative_difficulty, profile.after, profile.relative_after)))


def number(value: float | None) -> str:
    """Three digits; empty where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def tables(found: OutlierTable) -> list[Table]:
    """What the terminal shows: the largest outliers, and the most difficult activations."""
    shown = [_table(OUTLIER_COLUMNS, [outlier_row(o) for o in found.outliers[:_TERMINAL]],
                    _left_out(len(found.outliers), _TERMINAL, "kinds of outliers"))]
    profiles = worst_first(found.profiles)
    shown += [_table(PROFILE_COLUMNS, [profile_row(p) for p in profiles[:_TERMINAL]],
                     _left_out(len(profiles), _TERMINAL, "activations"))]
    return [table for table in shown if table.row_count]


def _left_out(count: int, limit: int, what: str) -> str:
    return f"and {count - limit} more {what}: save the report to see them" if count > limit else ""


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str) -> Table:
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption or None)
    for name in columns:
        table.add_column(name, overflow="fold",
                         justify="right" if columns is PROFILE_COLUMNS and name not in
                         PROFILE_COLUMNS[:2] else "left")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def section(found: OutlierTable | None) -> str:
    """The page's section on outliers; "" where none were looked for."""
    if found is None:
        return ""
    parts: list[str] = []
    if not found.outliers:
        parts.append("<p>No channel, token, weight or attention stands out.</p>\n")
    parts.append(simple_table("Outliers", OUTLIER_COLUMNS,
                              [outlier_row(o) for o in found.outliers[:_PAGE]]))
    if matplotlib_is_installed():
        from scaleprop.report.outliers_charts import charts

        figures = "".join(
            f"<figure>{chart.svg}<figcaption>{escape(chart.caption)}</figcaption></figure>"
            for chart in charts(found))
        parts.append(f'<div class="charts">{figures}</div>\n')
    else:
        parts.append("<p>No charts of outliers: matplotlib is not installed "
                     f"(<code>{install_command('matplotlib')}</code>).</p>\n")
    profiles = worst_first(found.profiles)[:_PAGE]
    parts.append(simple_table("Activations, the most difficult first", PROFILE_COLUMNS,
                              [profile_row(profile) for profile in profiles],
                              range(2, len(PROFILE_COLUMNS))))
    parts += [f"<p>{escape(note)}</p>\n" for note in found.notes]
    return "".join(parts)

