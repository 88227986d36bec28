"""What a training recipe did to a model's graphs, as JSON and as a page.

JSON, version 1 (``ScaleReports.save("x.json")``); numbers that are not finite are strings::

    schema          "scaleprop.training"
    schema_version  1
    unread          matrices among the parameters that no graph reads
    graphs          list of objects, in the order in which they were compiled, with
        high        product → why it stays in high precision
        block       a picture of one block, see ``report.graph.Block``; may be left out
      and, where exponents are fixed in the graph (``fp8``),
        products    product → role: fprop, dgrad or wgrad
        casts       list of objects with the fields of ``passes.training.lower.Cast``
        rescales    multiplications by powers of two that are left in the graph
        unruled     operator → how often it had to be given unscaled values
      else
        operands    list of objects with layer, role, value, axis and why, as ``Quantized`` of
                    ``passes.training.rewrite`` has them, and the fields of
                    ``recipes.training.Operand``
        truncated   how many values were, where a recipe truncates every one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from scaleprop.analysis.blocks import block_for_report
from scaleprop.analysis.training_view import prepared_block
from scaleprop.passes.training import Lowered
from scaleprop.report import text
from scaleprop.report.block_html import Drawn, block_section, with_values
from scaleprop.report.page import REPORT, Section, cards, notes_section, page, simple_table
from scaleprop.report.page_data import columns, plain_formats, short, slugs_of
from scaleprop.report.plain import plain
from scaleprop.report.tensors_html import Column, Row, TensorTable

if TYPE_CHECKING:
    from scaleprop.passes.training.operands import Operands
    from scaleprop.report.graph import Block
    from scaleprop.training import ScaleReports

SCHEMA = "scaleprop.training"
SCHEMA_VERSION = 1

Value = dict[str, Any]

COLUMNS = (
    Column("graph", "number"), Column("node", "node"), Column("role", "short"),
    Column("format", "short"), Column("amax", "number", "amax"), Column("drift", "short"),
    Column("divided by", "short"), Column("rounding", "short"), Column("rotation", "short"),
    Column("scaling", "short"), Column("layer", "name"), Column("why", "outcome"),
)


def to_dict(reports: ScaleReports) -> dict[str, Any]:
    """Plain data for JSON; see this module's docstring."""
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "unread": list(reports.unread),
            "graphs": [_graph(graph, place) for place, graph in enumerate(reports)]}


def _graph(graph: Lowered | Operands, place: int) -> dict[str, Any]:
    drawn = _drawn(graph, place)
    found: dict[str, Any] = {"high": dict(graph.high)}
    if drawn is not None:
        found["block"] = drawn.to_dict()
    if isinstance(graph, Lowered):
        return {**found, "products": dict(graph.products), "rescales": graph.rescales,
                "casts": [plain(dataclasses.asdict(cast)) for cast in graph.casts],
                "unruled": dict(graph.unruled)}
    operands = ({**dataclasses.asdict(each.operand), "layer": each.layer, "role": each.role,
                 "value": each.value, "axis": each.axis, "why": each.why}
                for each in graph.quantized)
    return {**found, "operands": list(map(plain, operands)), "truncated": graph.truncated}


def _drawn(graph: Lowered | Operands, place: int) -> Block | None:
    return block_for_report(lambda: prepared_block(graph, made=f"graph {place}"))


def render(reports: ScaleReports) -> str:
    """``reports`` as a complete HTML document. Every name in it is escaped."""
    graphs = [_values(graph) for graph in reports]
    values = [{**value, "graph": str(place) if len(reports) > 1 else ""}
              for place, found in enumerate(graphs) for value in found]
    slugs = slugs_of(f"{value['graph']}:{value['node']}:{value['role']}".lstrip(":")
                     for value in values)
    table = TensorTable.of(COLUMNS, [Row(slug, value["module"], value["source"], _cells(value))
                                     for slug, value in zip(slugs, values, strict=True)])
    high = [(str(place), node, why) for place, graph in enumerate(reports)
            for node, why in graph.high.items()]
    data = {"rows": len(values), "ids": slugs, "tensors": columns(list(map(_item, values))),
            "formats": {}, "plain": plain_formats(), "depth": []}
    return page("scaleprop: training in low precision", (
        Section("overview", "Overview", cards(
            [(f"graph {place}", *_summary(graph)) for place, graph in enumerate(reports)])),
        block_section(list(_blocks(reports, graphs, slugs))),
        Section("high", "What stayed in high precision, and why", simple_table(
            "Reasons for high precision", ("graph", "product", "reason"), high, (0,))),
        notes_section(list(_notes(reports))),
        Section("tensor-table", "Values in low precision", table.html(("role", "format"))),
    ), data, REPORT, table.style())


def _blocks(
    reports: ScaleReports, graphs: Sequence[Sequence[Value]], slugs: Sequence[str]
) -> Iterator[Drawn]:
    """A block of each graph; what was cast, and its box in the format, lead to its row."""
    rest = iter(slugs)
    for place, (graph, values) in enumerate(zip(reports, graphs, strict=True)):
        links: dict[str, str] = {}
        for value, slug in zip(values, rest, strict=False):  # as many as this graph has
            links.setdefault(value["node"], slug)
            links.setdefault(f"{value['node']} in {value['format']}", slug)
        block = _drawn(graph, place)
        if block is not None:
            yield with_values(block, links)


def _summary(graph: Lowered | Operands) -> tuple[str, str]:
    high = f"{len(graph.high)} products stayed high"
    if isinstance(graph, Lowered):
        return f"{len(graph.casts)} casts", f"{len(graph.products)} products read them; {high}"
    if graph.truncated:
        return f"{graph.truncated} values", "truncated"
    return f"{len(graph.quantized)} operands", high


def _notes(reports: ScaleReports) -> Iterator[str]:
    if not reports:
        yield "The model was not called since it was prepared: no graph was compiled yet."
    if reports.unread:
        yield f"Not compiled, as it was: {', '.join(reports.unread)}."
    for place, graph in enumerate(reports):
        if isinstance(graph, Lowered) and graph.unruled:
            found = ", ".join(f"{name} ({count}×)" for name, count in graph.unruled.items())
            yield f"Graph {place}: {found} read unscaled values: no rule moves scales through."


def _values(graph: Lowered | Operands) -> list[Value]:
    """What was cast or quantized, by the names of ``COLUMNS``; and where it is made."""
    steps = {} if graph.outline is None else graph.outline.forward.named()
    found: list[Value] = []
    if isinstance(graph, Lowered):
        for cast in graph.casts:
            step = steps.get(cast.value)
            found.append({
                "node": cast.value, "role": cast.kind, "format": cast.element, "amax": cast.amax,
                "drift": f"2^{cast.drift:.1f}", "why": cast.why,
                "divided by": "at run time" if cast.exponent is None else f"2^{cast.exponent}",
                "layer": step.op if step is not None and step.kind == "parameter" else ""})
    else:
        for each in graph.quantized:
            operand = each.operand
            found.append({
                "node": each.value, "role": each.role, "format": operand.format, "why": each.why,
                "rounding": operand.rounding, "scaling": operand.scaling, "layer": each.layer,
                "rotation": f"{operand.hadamard} {operand.signs}" if operand.hadamard else ""})
    for value in found:
        step = steps.get(value["node"])
        value |= {"module": step.module if step is not None else "",
                  "source": step.source if step is not None else ""}
    return found


def _cells(value: Value) -> tuple[str, ...]:
    shown = {**value, "amax": "" if value.get("amax") is None else f"{value['amax']:.3g}"}
    return tuple(shown.get(column.name, "") for column in COLUMNS)


def _item(value: Value) -> Value:
    """What the page's scripts know of one value."""
    kept = ("node", "role", "format", "module", "layer", "rounding", "rotation", "why")
    return {**{name: value.get(name) for name in kept}, "amax": short(value.get("amax")),
            "source": text.short_place(value["source"]),
            "scaling": value.get("divided by") or value.get("scaling")}
