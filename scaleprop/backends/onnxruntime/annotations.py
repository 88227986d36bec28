"""What viewers of ONNX files show of a node or value that is clicked on: formats, scales, reasons.

On the node that makes an operator's result: ``doc_string``, and in ``metadata_props`` one entry an
operand. On values: how they are read; on stored parameters: how they are stored. Runtimes read none
of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import onnx_ir as ir
import torch

from scaleprop.passes.base import Program
from scaleprop.passes.known_scales import known_scales, stored_codes, summary
from scaleprop.passes.operators import FAKE_QUANTIZE, QUANTIZE
from scaleprop.report import text
from scaleprop.report.records import TensorRecord

PREFIX = "scaleprop."
READ_AS, STORED_AS = f"{PREFIX}read_as", f"{PREFIX}stored_as"
_SHORT = {"fprop.x": "x", "fprop.w": "w"}


def annotate(program: Program, graph: ir.Graph, values: Mapping[str, str]) -> None:
    """Write on ``graph`` what ``program`` knows. values: graph node → name of its ONNX value."""
    made = {value.name: value for node in graph for value in node.outputs}
    made.update((value.name, value) for value in graph.inputs)
    scales = _Scales(program)
    by_node: defaultdict[str, list[TensorRecord]] = defaultdict(list)
    for record in program.records:
        by_node[record.node].append(record)
    for name, records in by_node.items():
        value = made.get(values.get(name, ""))
        producer = None if value is None else value.producer()
        if producer is not None:
            _note(producer, records, scales)
    for record in program.records:
        value = made.get(values.get(record.operand, ""))
        if value is not None and record.format is not None:
            _add(value, READ_AS, _described(record, scales))
    _note_parameters(program.records, graph.initializers.values(), scales)


def _note(producer: ir.Node, records: Iterable[TensorRecord], scales: _Scales) -> None:
    lines: list[str] = []
    for record in records:
        operand = _SHORT.get(record.role, record.role)
        told = f"{record.operand}: {_described(record, scales)}"
        producer.metadata_props[f"{PREFIX}{operand}"] = told
        lines.append(f"{operand} = {told}")
        if record.source and not producer.doc_string:
            producer.doc_string = f"{record.op}, {text.place(record)}"
    producer.doc_string = "\n".join(filter(None, (producer.doc_string, *lines)))


def _note_parameters(
    records: Iterable[TensorRecord], initializers: Iterable[ir.Value], scales: _Scales
) -> None:
    """Initializers are called as the codes' buffer, or as the node that reads it."""
    stored = {each: record for record in records
              if record.scale_kind == "weight" and (codes := scales.codes(record)) is not None
              for each in (str(codes.target), codes.name)}
    for value in initializers:
        record = stored.get(re.sub(r"__\d+$", "", value.name or ""))
        if record is not None:
            _add(value, STORED_AS, _described(record, scales))


def _add(value: ir.Value, key: str, told: str) -> None:
    """One entry for all readers; those that read the same are said once."""
    known = value.metadata_props.get(key, "")
    if told not in known.split("; "):
        value.metadata_props[key] = f"{known}; {told}" if known else told


def _described(record: TensorRecord, scales: _Scales) -> str:
    """``int8+zp, static scale 2^-5.2, SQNR 38.1 dB, by quantize-activations``."""
    if record.format is None:
        return f"high: {record.reason or 'no reason given'}, by {record.decided_by}"
    quality = f"SQNR {text.decibels(record.sqnr_db)} dB" if record.sqnr_db is not None else ""
    kind = "" if record.scale_kind == "weight" else f"{record.scale_kind} "
    parts = (record.format, f"{kind}scale {scales.of(record)}".strip(), quality,
             f"by {record.decided_by}")
    return ", ".join(part for part in parts if part)


class _Scales:
    """Stored scales by operand."""

    def __init__(self, program: Program) -> None:
        self._known = known_scales(program.module)
        self._read: dict[tuple[str, str], str] = {}
        for node in program.module.graph.nodes:
            for source in node.all_input_nodes:
                if source.target in (QUANTIZE, FAKE_QUANTIZE):
                    operand = source.all_input_nodes[0].name
                    self._read[node.name, operand] = source.name
        self._codes = stored_codes(program.module)

    def codes(self, record: TensorRecord) -> torch.fx.Node | None:
        """The node that has the codes of a stored weight."""
        return self._codes.get((record.operand, record.format or ""))

    def of(self, record: TensorRecord) -> str:
        """``2^-5.2``, or ``2^-9…2^-6`` of several; "" where it is found at run time."""
        if record.scale_kind == "weight":
            codes = self.codes(record)
            name = "" if codes is None else codes.name
        else:
            name = self._read.get((record.node, record.operand), "")
        found: torch.Tensor | None = self._known.get(name)
        return "" if found is None or record.format is None else \
            summary(found, record.format).text
