"""Scales on the graph itself: a block of a compiled model, with what its data are divided by."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import ops
from scaleprop.analysis.blocks import block_of, chosen_block
from scaleprop.formats.scaled import PLAIN, parse
from scaleprop.formats.scales import decoded_scale
from scaleprop.passes.base import Program
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.outline import Outline, Read, Step, op_name, outline_of
from scaleprop.report.graph import Block, Scale
from scaleprop.report.graph.model import power_of_two
from scaleprop.report.records import TensorRecord

_MEANING = ("→ what the data are divided by: scales as stored, least…greatest of several; of those "
            "that are found at run time, the median on the example inputs. Grey: high precision")
_SCALES = 5  # the argument of ``quantize`` that has static scales


def program_block(
    program: Program, block: str | None = None, depth: int | None = None,
    made: str = "",
) -> Block:
    """A block of a program, with forward scales; dynamic ones are measured on its example inputs.

    Args:
        block: a module's path; "" for the whole model; None for the most typical block.
        depth: see ``blocks.block_of``.
        made: by which recipe, for which backend: for the reader.

    Raises:
        ConfigError: where no operator is in a module of this path, naming those that are.
    """
    outline = _as_captured(outline_of(program), program.records)
    module = chosen_block(outline, block)
    named = outline.named()
    wanted = {read.source for name in module.steps for read in named[name].reads}
    facts = _Facts(program, wanted | set(module.steps))
    return block_of(outline, module.path, depth, facts, _MEANING, made)


def _as_captured(outline: Outline, records: Sequence[TensorRecord]) -> Outline:
    """Scaled products called as what they took the place of."""
    names = {record.node: record.op.split(".")[1] for record in records if "." in record.op}
    scaled = op_name(SCALED_MM)
    return Outline(tuple(dataclasses.replace(step, op=names.get(step.name, scaled))
                         if step.op == scaled else step for step in outline.steps))


class _Facts:
    """What is known of the values of a compiled block."""

    def __init__(self, program: Program, wanted: Collection[str]) -> None:
        self._records = {(record.node, record.operand): record for record in program.records}
        quantized = [node for node in program.module.graph.nodes
                     if node.name in wanted and node.target in (QUANTIZE, FAKE_QUANTIZE)]
        self._dynamic = {node.name for node in quantized
                         if len(node.args) <= _SCALES or node.args[_SCALES] is None}
        self._scales = {**_measured(program, quantized), **_stored(program.module, wanted)}

    def __call__(
        self, source: Step, read: Read, reader: Step
    ) -> tuple[Scale | None, Scale | None, str]:
        """The scale of quantized data; why high data are high."""
        record = self._record(source, read, reader)
        found = self._scales.get(source.name)
        if found is None:
            reason = record.reason if record is not None else None
            return None, None, f"high precision ({source.dtype}){': ' if reason else ''}" \
                               f"{reason or ''}"
        if not found.numel():
            return Scale(None, format=source.format), None, "every value is zero"
        low, middle, high = (float(each) for each in (found.min(), found.median(), found.max()))
        is_dynamic = source.name in self._dynamic
        scale = Scale(middle, format=source.format) if is_dynamic else \
            Scale(middle, low, high, source.format)
        several = f", least {low:.6g}, greatest {high:.6g} of {found.numel()}" \
            if found.numel() > 1 else ""
        how = "found at run time" if is_dynamic else "as stored"
        parts = [f"{source.format}, scale {how}: {power_of_two(middle)} = {middle:.6g}{several}"]
        if record is not None:
            quality = "" if record.sqnr_db is None else f"SQNR {record.sqnr_db:.1f} dB, "
            parts.append(f"{quality}decided by {record.decided_by}")
        return scale, None, "\n".join(parts)

    def _record(self, source: Step, read: Read, reader: Step) -> TensorRecord | None:
        """That of an operand, under the name of any node that it comes through."""
        names = (*read.via, source.op, *(name for each in source.reads for name in each.via))
        return next((self._records[reader.name, name] for name in names
                     if (reader.name, name) in self._records), None)


def _measured(program: Program, nodes: Collection[torch.fx.Node]) -> dict[str, torch.Tensor]:
    """Positive scales of quantized values, in one run on the example inputs."""
    if not nodes:
        return {}
    watch = _Watch(program.module, nodes)
    with torch.no_grad():
        watch.run(*program.example_leaves, enable_io_processing=False)
    return watch.scales


class _Watch(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, nodes: Collection[torch.fx.Node]) -> None:
        super().__init__(module)
        self.scales: dict[str, torch.Tensor] = {}
        self._nodes = frozenset(nodes)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            parts = value if n.target is QUANTIZE else ops.quantize(*args, **kwargs)
            self.scales[n.name] = _positive(parts, str(n.args[1]))
        return value


def _stored(module: torch.fx.GraphModule, wanted: Collection[str]) -> dict[str, torch.Tensor]:
    """Scales of stored parameters: name of the node that has the codes → positive scales."""
    found: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        for parts, format_ in _stored_operands(node):
            roots = [_root(part) for part in parts]
            if format_ in PLAIN or roots[0].op != "get_attr" or roots[0].name not in wanted:
                continue
            tensors = [_tensor(module, root) for root in roots]
            found[roots[0].name] = _positive(tensors, format_)
    return found


def _stored_operands(node: torch.fx.Node) -> list[tuple[Sequence[torch.fx.Node], str]]:
    args: Any = node.args
    if node.target is DEQUANTIZE:
        return [(args[0], args[1])]
    return [(args[1], args[4])] if node.target is SCALED_MM and isinstance(args[1], list | tuple) \
        else []


def _root(node: Any) -> torch.fx.Node:
    """What stored parts are rows of."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _tensor(module: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()


def _positive(parts: Sequence[torch.Tensor], format_: str) -> torch.Tensor:
    """Scales as float32, those of nothing but zeros left out."""
    fmt = parse(format_)
    scales = decoded_scale(parts[1], fmt)
    if fmt.two_level:
        scales = scales * parts[2]
    return scales[scales > 0]


