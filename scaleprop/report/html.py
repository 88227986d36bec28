"""The report's page: an overview, charts through depth, and a table of every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from scaleprop.report import text, transforms_table
from scaleprop.report.block_html import Drawn, block_section, with_records, with_values
from scaleprop.report.outliers_table import section as outliers_section
from scaleprop.report.page import REPORT, Section, cards, notes_section, page, simple_table
from scaleprop.report.page_data import report_data, slugs_of
from scaleprop.report.records import TensorRecord, Variant
from scaleprop.report.scales_table import short_op
from scaleprop.report.tensors_html import Column, Row, TensorTable, fragment

if TYPE_CHECKING:
    from scaleprop.report.report import Report

_WORST = 8  # tensors of the lowest SQNR that the overview links to

COLUMNS = (
    Column("#", "number"), Column("node", "node"), Column("operator", "name"),
    Column("operand", "node"), Column("shape", "short"), Column("role", "short"),
    Column("format", "short"), Column("scale", "short"), Column("RMS", "number", "rms"),
    Column("amax", "number", "amax"), Column("SQNR dB", "number", "sqnr"),
    Column("sat. %", "number", "saturated"), Column("underfl. %", "number", "underflowed"),
    Column("bytes", "number", "bytes"), Column("runs as, or why not", "outcome"),
    Column("decided by", "short"),
)
_MEASURES = {  # of ``fidelity.Fidelity``: what is compared
    "cosine": "to the model that was given",
    "format_error": "reference against the model that was given",
    "lowering_error": "backend against the reference",
}
_COLUMNS = _MEASURES | {  # of recipes side by side
    "size": "÷ that of the model that was given",
    "speed": "median time of the model that was given ÷ that of the compiled one",
}
_FILTERS = ("format", "kind", "role", "op")


def render(report: Report) -> str:
    """``report`` as a complete HTML document. Every name in it is escaped."""
    slugs = slugs_of(f"{record.node}:{record.operand}" for record in report.records)
    table = _tensors(report.records, slugs)
    data = report_data(report.records, slugs, report.scales)
    parts = (
        Section("overview", "Overview", _overview(report, slugs)),
        Section("depth", "Through depth", depth_figures(bool(report.records or report.scales))),
        block_section(_blocks(report, slugs, data["ids"][len(slugs):])),
        Section("outliers", "Outliers", outliers_section(report.outliers)),
        Section("transforms", "Transforms",
                transforms_table.section(report.transforms, report.trials)),
        Section("high", "What stayed in high precision, and why", _high(report)),
        notes_section(report.notes),
        Section("tensor-table", "Tensors", table.html(_FILTERS)),
    )
    return page(f"scaleprop: {report.recipe or 'analysis'}", parts, data, REPORT, table.style())


def _blocks(report: Report, slugs: Sequence[str], others: Sequence[str]) -> list[Drawn]:
    """The compiled block and that of a training step; ``others`` are the slugs of ``scales``."""
    scales, found = report.scales, list[Drawn]()
    values = {} if scales is None else dict(zip(
        (tensor.node for tensor in scales.tensors), others, strict=True))
    if report.block is not None:  # a step has nodes of the same names, but other ones
        is_step = scales is not None and bool(scales.of_phase("backward"))
        found.append(with_records(report.block, report.records, slugs, {} if is_step else values))
    if scales is not None and scales.block is not None:
        found.append(with_values(scales.block, values))
    return found


def _overview(report: Report, slugs: Sequence[str]) -> str:
    items = [("backend", escape(report.backend or "none"), "")]
    if report.size_ratio is not None:
        items.append((
            "parameters", text.megabytes(report.nbytes_after),
            f"{report.size_ratio:.3f}× of {text.megabytes(report.nbytes_before)}"))
    items.append(("quantized" if report.recipe else "compared", report.tally, "tensors"))
    worst = _worst(report, slugs)
    if worst:
        value, link = worst[0]
        items.append(("lowest SQNR", f"{value} dB", link))
    items += [(name.replace("_", " "), f"{value:.6g}", _MEASURES.get(name, ""))
              for name, value in report.fidelity.items()]
    listed = "".join(f"<li><b>{value} dB</b> {link}</li>" for value, link in worst)
    lowest = ("<div><h3>Lowest signal-to-noise ratios</h3>\n"
              f'<ol class="worst">{listed}</ol></div>\n' if len(worst) > 1 else "")
    return (cards(items) + _variants(report.variants, report.recipe)
            + f'<div class="pair">{_bytes(report.records)}{lowest}</div>\n')


def _worst(report: Report, slugs: Sequence[str]) -> list[tuple[str, str]]:
    """(SQNR, link) of the tensors with the lowest SQNR, lowest first."""
    measured = [(record.sqnr_db, index) for index, record in enumerate(report.records)
                if record.format is not None and record.sqnr_db is not None
                and math.isfinite(record.sqnr_db)]
    found: list[tuple[str, str]] = []
    for value, index in sorted(measured)[:_WORST]:
        record = report.records[index]
        where = f"{short_op(record.op)} {record.module or record.node}, {record.format}"
        found.append((text.decibels(value),
                      f'<a href="{fragment(slugs[index])}">{escape(record.operand)}</a> '
                      f"<small>{escape(where)}</small>"))
    return found


def _variants(variants: Sequence[Variant], recipe: str | None) -> str:
    """The recipes side by side."""
    measures = list(dict.fromkeys(name for variant in variants for name in variant.fidelity))
    head = ("recipe", "backend", "parameters", "size", "speed", *measures)
    rows = [(
        variant.recipe + (" (this page)" if variant.recipe == recipe else ""), variant.backend,
        text.megabytes(variant.nbytes),
        "" if variant.size_ratio is None else f"{variant.size_ratio:.3f}×",
        "" if variant.speed is None else f"{variant.speed:.2f}×",
        *(f"{variant.fidelity[name]:.6g}" if name in variant.fidelity else ""
          for name in measures)) for variant in variants]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = simple_table("Recipes side by side", [head[i].replace("_", " ") for i in kept],
                         [[row[i] for i in kept] for row in rows], range(2, len(kept)))
    said = [f"{name.replace('_', ' ')}: {_COLUMNS[name]}" for name in (head[i] for i in kept)
            if name in _COLUMNS]
    return f"<h3>Recipes side by side</h3>\n{table}<p>{escape('; '.join(said))}.</p>\n" \
        if table else ""


def _bytes(records: Sequence[TensorRecord]) -> str:
    """Stored bytes by format, as bars."""
    totals: Counter[str] = Counter()
    for record in records:
        if record.nbytes:
            totals[record.format or text.HIGH] += record.nbytes
    if not totals:
        return ""
    greatest = max(totals.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{text.megabytes(count)}</td>'
        f'<td class="bar"><span class="{"grey" if name == text.HIGH else ""}" '
        f'style="width:{100 * count / greatest:.1f}%"></span></td></tr>'
        for name, count in totals.most_common())
    return ('<div><h3>Stored bytes by format</h3>\n<table class="bars">'
            '<caption class="unseen">Stored bytes by format</caption><thead class="unseen"><tr>'
            '<th scope="col">format</th><th scope="col">stored</th><th scope="col">share</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div>\n")


def depth_figures(any_tensor: bool) -> str:
    """Where ``depth.js`` draws; removed by it where nothing was measured."""
    if not any_tensor:
        return ""
    return """<div class="controls scripted">
<label>Range shown as a band<select id="range"></select></label>
</div>
<div id="charts" class="figures"></div>
<p class="unscripted">The charts need JavaScript; their numbers are in the table.</p>
"""


def _high(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="number">{count}</td><td class="mono">{escape(op)}</td>'
        f'<td>{escape(reason)}</td><td><a class="scripted" href="#tensor-table" '
        f'data-search="{escape(short_op(op))} {escape(reason)}">show '
        f'<span class="unseen">{escape(op)}</span></a></td></tr>\n'
        for op, reason, count in report.reasons()
    )
    if not rows:
        return ""
    return f"""<div class="scroll fit" tabindex="0" role="region" aria-label="Reasons"><table>
<caption class="unseen">Reasons for high precision</caption><thead class="plain"><tr>
<th scope="col" class="number">tensors</th><th scope="col">operator</th><th scope="col">reason</th>
<th scope="col"><span class="unseen">in the table</span></th></tr></thead><tbody>
{rows}</tbody></table></div>
"""


def _tensors(records: Sequence[TensorRecord], slugs: Sequence[str]) -> TensorTable:
    return TensorTable.of(COLUMNS, [
        Row(slug, record.module, record.source, cells, high=record.format is None)
        for slug, record, cells in zip(slugs, records, _cells(records), strict=True)])


def _cells(records: Sequence[TensorRecord]) -> list[tuple[str, ...]]:
    """The cells of ``COLUMNS``, row by row."""
    return [(
        str(index), record.node, short_op(record.op), record.operand, text.shape(record),
        record.role, record.format or text.HIGH, record.scale_kind or "",
        text.digits(record.values and record.values.rms),
        text.digits(record.values and record.values.amax),
        text.decibels(record.sqnr_db), text.percent(record.saturated),
        text.percent(record.underflowed), "" if record.nbytes is None else f"{record.nbytes:,}",
        text.outcome(record), record.decided_by,
    ) for index, record in enumerate(records)]

