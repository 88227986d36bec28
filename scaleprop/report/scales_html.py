"""A scale report as one HTML file: no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from scaleprop.report import text
from scaleprop.report.block_html import block_section, with_values
from scaleprop.report.html import depth_figures
from scaleprop.report.listing import size
from scaleprop.report.page import REPORT, Section, notes_section, page, simple_table
from scaleprop.report.page_data import scales_data, slugs_of
from scaleprop.report.scales import Finding, ScaleReport, TensorScale
from scaleprop.report.scales_table import short_op, summary_rows
from scaleprop.report.tensors_html import Column, Row, TensorTable

COLUMNS = (
    Column("node", "node"), Column("operator", "name"), Column("phase", "short"),
    Column("shape", "short"), Column("parameter", "name"), Column("RMS", "number", "rms"),
    Column("predicted", "number", "predicted"), Column("ratio", "number"),
    Column("amax", "number", "amax"), Column("mean", "number", "mean"),
    Column("kurtosis", "number", "kurtosis"), Column("zeros %", "number", "zeros"),
    Column("lost without a scale: ↓ below, ↑ above", "outcome"),
)


def render(report: ScaleReport) -> str:
    """``report`` as a complete HTML document. Every name in it is escaped."""
    slugs = slugs_of(tensor.node for tensor in report.tensors)
    table = TensorTable.of(COLUMNS, list(map(_row, report.tensors, slugs)))
    listed = report.annotated_source()
    values = dict(zip((tensor.node for tensor in report.tensors), slugs, strict=True))
    drawn = [with_values(report.block, values)] if report.block is not None else []
    return page(f"scaleprop: scales of {report.model}", (
        Section("overview", "Overview", _summary(report)),
        Section("depth", "Through depth", depth_figures(bool(report.tensors))),
        block_section(drawn),
        Section("findings", "Signal propagation through depth", _findings(report.findings)),
        Section("source", "Source: RMS of values (→) and of their gradients (←)",
                '<div class="scroll" tabindex="0" role="region" aria-label="Source">'
                f'<pre class="mono">{escape(listed)}</pre></div>\n' if listed else ""),
        notes_section(report.notes),
        Section("tensor-table", "Tensors", table.html(("phase", "op"))),
    ), scales_data(report.tensors, slugs), REPORT, table.style())


def _summary(report: ScaleReport) -> str:
    skipped = {"note", "model", *(finding.name for finding in report.findings),
               *(f"! {finding.name}" for finding in report.findings)}
    rows = [row for row in summary_rows(report) if row[0] not in skipped]
    return simple_table("Summary", ("of", "what was seen"), rows)


def _findings(found: Sequence[Finding]) -> str:
    items = "".join(
        f"<li><b>{escape(finding.name)}</b>{' (!)' if finding.warning else ''}: "
        f"{escape(finding.message)}. {escape(finding.advice)}.</li>" for finding in found)
    return f"<ul>{items}</ul>\n" if items else ""


def _row(tensor: TensorScale, slug: str) -> Row:
    cells = (
        tensor.node, short_op(tensor.op), tensor.phase,
        "×".join(map(str, tensor.shape)) or "scalar", tensor.name, size(tensor.rms),
        "?" if tensor.predicted is None else size(tensor.predicted),
        "" if tensor.ratio is None else f"{tensor.ratio:.2f}", size(tensor.amax),
        size(tensor.mean), "" if tensor.kurtosis is None else f"{tensor.kurtosis:.1f}",
        text.percent(tensor.zeros), ", ".join(tensor.flags),
    )
    return Row(slug, tensor.module, tensor.source, cells)
