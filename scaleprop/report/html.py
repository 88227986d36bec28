"""The report as one HTML file: style, script and charts inline, no request to anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from scaleprop.extras import install_command
from scaleprop.report import text, transforms_table
from scaleprop.report.charts import Chart, charts, matplotlib_is_installed
from scaleprop.report.outliers_table import section
from scaleprop.report.records import TensorRecord

if TYPE_CHECKING:
    from scaleprop.report.report import Report

# What the page may load: nothing but its own style and script.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_COLUMNS = (  # heading, whether it holds numbers
    ("#", True), ("node", False), ("operator", False), ("operand", False), ("shape", False),
    ("format", False), ("scale", False), ("SQNR dB", True), ("sat. %", True),
    ("underfl. %", True), ("bytes", True), ("runs as, or why not", False), ("decided by", False),
)


def render(report: Report) -> str:
    """``report`` as a complete HTML document. Every name in it is escaped."""
    title = f"scaleprop: {report.recipe or 'analysis'}"
    parts = (
        _cards(report),
        _charts(report),
        section(report.outliers),
        transforms_table.section(report.transforms, report.trials),
        _high(report),
        notes_section(report.notes),
        _tensors(report.records),
    )
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A complete document of sections that are HTML already; style and script inline."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(part for part in parts if part)}
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("scaleprop.report").joinpath("assets", name).read_text(encoding="utf-8")


def _cards(report: Report) -> str:
    cards = [("backend", report.backend or "none", "")]
    if report.size_ratio is not None:
        cards.append((
            "parameters", text.megabytes(report.nbytes_after),
            f"{report.size_ratio:.3f}× of {text.megabytes(report.nbytes_before)}",
        ))
    cards.append(("quantized" if report.recipe else "compared", report.tally, "tensors"))
    measured = [r for r in report.quantized if r.sqnr_db is not None]
    if measured:
        worst = min(measured, key=lambda r: r.sqnr_db if r.sqnr_db is not None else math.inf)
        cards.append(("lowest SQNR", f"{text.decibels(worst.sqnr_db)} dB",
                      f"{worst.node}, {worst.operand}"))
    cards += [(name, f"{value:.6g}", "") for name, value in report.fidelity.items()]
    items = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}'
        f"<small>{escape(detail)}</small></dd></div>"
        for name, value, detail in cards
    )
    return f'<dl class="cards">{items}</dl>\n'


def _charts(report: Report) -> str:
    drawn: Sequence[Chart] = charts(report.records)
    if not drawn:
        if matplotlib_is_installed():
            return ""
        return (f"<p>No charts: matplotlib is not installed "
                f"(<code>{install_command('matplotlib')}</code>).</p>\n")
    figures = "".join(
        f"<figure>{chart.svg}<figcaption>{escape(chart.caption)}</figcaption></figure>"
        for chart in drawn
    )
    return f'<h2>Where the error and the bytes are</h2>\n<div class="charts">{figures}</div>\n'


def _high(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="number">{count}</td><td class="mono">{escape(op)}</td>'
        f"<td>{escape(reason)}</td></tr>"
        for op, reason, count in report.reasons()
    )
    if not rows:
        return ""
    return f"""<h2>What stayed in high precision, and why</h2>
<div class="scroll fit"><table><thead class="plain"><tr><th class="number">tensors</th>
<th>operator</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>
"""


def notes_section(notes: Sequence[str]) -> str:
    """Sentences as a list; nothing where there are none."""
    if not notes:
        return ""
    return f"<h2>Notes</h2>\n<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>\n"


def _tensors(records: Sequence[TensorRecord]) -> str:
    if not records:
        return "<h2>Tensors</h2>\n<p>There are no tensors in this report.</p>\n"
    formats = sorted({record.format or text.HIGH for record in records})
    kinds = sorted({record.scale_kind for record in records if record.scale_kind})
    headings = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if number else ""}>'
        f'<button type="button">{escape(name)}</button></th>'
        for name, number in _COLUMNS
    )
    scale = max((r.sqnr_db for r in records if r.sqnr_db and math.isfinite(r.sqnr_db)), default=1.0)
    rows = "\n".join(_row(index, record, scale) for index, record in enumerate(records))
    return f"""<h2>Tensors</h2>
<div class="controls">
<label>Filter (press /)<input type="search" name="text" autocomplete="off"
 placeholder="words in any column"></label>
{selector("format", formats)}{selector("scale", kinds)}
<span id="shown" role="status">{len(records)} tensors</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Tensors">
<table id="tensors"><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table></div>
"""


def selector(name: str, values: Sequence[str]) -> str:
    """A choice among the values of one column, ``data-<name>`` of its rows."""
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return (f'<label>{name}<select name="{name}"><option value="">all</option>'
            f"{options}</select></label>\n")


def _row(index: int, record: TensorRecord, scale: float) -> str:
    source = f'<span class="source">{escape(text.place(record))}</span>' if record.source else ""
    bar = _share(record.sqnr_db, scale)
    nbytes = "" if record.nbytes is None else f"{record.nbytes:,}"
    cells = (
        number_cell(str(index), float(index)),
        f'<td class="node mono">{escape(record.node)}{source}</td>',
        f'<td class="mono name">{escape(record.op)}</td>',
        f'<td class="name">{escape(record.operand)}</td>',
        f"<td>{escape(text.shape(record))}</td>",
        f'<td class="mono">{escape(record.format or text.HIGH)}</td>',
        f"<td>{record.scale_kind or ''}</td>",
        number_cell(text.decibels(record.sqnr_db), record.sqnr_db, f' style="--share:{bar:.0f}%"'),
        number_cell(text.percent(record.saturated), record.saturated),
        number_cell(text.percent(record.underflowed), record.underflowed),
        number_cell(nbytes, record.nbytes),
        f'<td class="outcome">{escape(text.outcome(record))}</td>',
        f"<td>{escape(record.decided_by)}</td>",
    )
    high = "" if record.format else " class=high"
    return (f'<tr{high} data-format="{escape(record.format or text.HIGH)}" '
            f'data-scale="{record.scale_kind or ""}">{"".join(cells)}</tr>')


def number_cell(shown: str, value: float | None, bar: str = "") -> str:
    """A right-aligned cell; ``data-value`` is what it sorts by, empty where not measured."""
    if value is None:
        key = ""
    elif math.isfinite(value):
        key = repr(value)
    else:
        key = "" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    kind = "number sqnr" if bar and value is not None else "number"
    return f'<td class="{kind}" data-value="{key}"{bar}>{escape(shown)}</td>'


def _share(value: float | None, scale: float) -> float:
    """The length of a bar, in per cent of the longest."""
    if value is None or math.isnan(value):
        return 0.0
    return 100 * min(max(value / scale, 0.0), 1.0)
