"""A scale report as one HTML file: no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from scaleprop.report import text
from scaleprop.report.html import notes_section, number_cell, page, selector
from scaleprop.report.listing import size
from scaleprop.report.scales import Finding, ScaleReport, TensorScale
from scaleprop.report.scales_table import COLUMNS, short_op, summary_rows


def render(report: ScaleReport) -> str:
    """``report`` as a complete HTML document. Every name in it is escaped."""
    return page(f"scaleprop: scales of {report.model}", (
        _summary(report), _findings(report.findings), _source(report), notes_section(report.notes),
        _tensors(report.tensors)))


def _summary(report: ScaleReport) -> str:
    skipped = {"note", "model", *(finding.name for finding in report.findings),
               *(f"! {finding.name}" for finding in report.findings)}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
                   for name, value in summary_rows(report) if name not in skipped)
    return f'<div class="scroll fit"><table><tbody>{rows}</tbody></table></div>\n'


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return ""
    items = "".join(
        f"<li><b>{escape(finding.name)}</b>{' (!)' if finding.warning else ''}: "
        f"{escape(finding.message)}. {escape(finding.advice)}.</li>" for finding in found)
    return f"<h2>Signal propagation through depth</h2>\n<ul>{items}</ul>\n"


def _source(report: ScaleReport) -> str:
    listed = report.annotated_source()
    if not listed:
        return ""
    return ("<h2>Source: RMS of values (→) and of their gradients (←)</h2>\n"
            f'<div class="scroll"><pre class="mono">{escape(listed)}</pre></div>\n')


def _tensors(tensors: Sequence[TensorScale]) -> str:
    headings = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if number else ""}>'
        f'<button type="button">{escape(name)}</button></th>' for name, number in COLUMNS)
    rows = "\n".join(map(_row, tensors))
    phases = sorted({tensor.phase for tensor in tensors})
    return f"""<h2>Tensors</h2>
<div class="controls">
<label>Filter (press /)<input type="search" name="text" autocomplete="off"
 placeholder="words in any column"></label>
{selector("phase", phases)}
<span id="shown" role="status">{len(tensors)} tensors</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Tensors">
<table id="tensors"><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table></div>
"""


def _row(tensor: TensorScale) -> str:
    source = f'<span class="source">{escape(text.short_place(tensor.source))}</span>'
    where = tensor.name or tensor.module
    ratio = "" if tensor.ratio is None else f"{tensor.ratio:.2f}"
    kurtosis = "" if tensor.kurtosis is None else f"{tensor.kurtosis:.1f}"
    predicted = "?" if tensor.predicted is None else size(tensor.predicted)
    cells = (
        f'<td class="node mono">{escape(tensor.node)}{source}</td>',
        f'<td class="mono name">{escape(short_op(tensor.op))}</td>', f"<td>{tensor.phase}</td>",
        f"<td>{'×'.join(map(str, tensor.shape)) or 'scalar'}</td>",
        f'<td class="name">{escape(where)}</td>',
        number_cell(size(tensor.rms), tensor.rms), number_cell(predicted, tensor.predicted),
        number_cell(ratio, tensor.ratio), number_cell(size(tensor.amax), tensor.amax),
        number_cell(size(tensor.mean), tensor.mean), number_cell(kurtosis, tensor.kurtosis),
        number_cell(text.percent(tensor.zeros), tensor.zeros),
        f"<td>{escape(', '.join(tensor.flags))}</td>",
    )
    return f'<tr data-phase="{tensor.phase}">{"".join(cells)}</tr>'
