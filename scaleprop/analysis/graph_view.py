"""Scales on the graph itself: a block of a compiled model, with what its data are divided by."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import ops
from scaleprop.analysis.blocks import block_of, chosen_block
from scaleprop.passes.base import Program
from scaleprop.passes.known_scales import known_scales, positive_scales, static_scales, summary
from scaleprop.passes.operators import FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.outline import Outline, Read, Step, op_name, outline_of
from scaleprop.report.graph import Block, Scale
from scaleprop.report.graph.model import power_of_two
from scaleprop.report.records import TensorRecord

_MEANING = ("→ what the data are divided by: scales as stored, least…greatest of several; of those "
            "that are found at run time, the median on the example inputs. Grey: high precision")


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
        dynamic = [node for node in program.module.graph.nodes
                   if node.name in wanted and node.target in (QUANTIZE, FAKE_QUANTIZE)
                   and static_scales(node) is None]
        self._dynamic = {node.name for node in dynamic}
        self._scales = {**_measured(program, dynamic), **known_scales(program.module, wanted)}

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
            return Scale(None, format=source.format), None, \
                "no positive scale: values are zero, or not finite"
        scale = summary(found, source.format)
        assert scale.value is not None
        several = f", least {scale.low:.6g}, greatest {scale.high:.6g} of {found.numel()}" \
            if found.numel() > 1 else ""
        is_dynamic = source.name in self._dynamic
        how = "found at run time" if is_dynamic else "as stored"
        parts = [f"{source.format}, scale {how}: {power_of_two(scale.value)} = "
                 f"{scale.value:.6g}{several}"]
        if is_dynamic:  # of the example's data: no ends that hold for others
            scale = Scale(scale.value, format=source.format)
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
            self.scales[n.name] = positive_scales(parts[1:], str(n.args[1]))
        return value
