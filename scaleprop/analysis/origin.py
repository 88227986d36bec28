"""The model that was given, for comparison with what transforms made of it.

Its parameters are not kept alive: the comparison is there as long as the model itself is.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.analysis.compiled import (
    Numbers,
    Operand,
    Rounded,
    channel_magnitudes,
    get_tensor,
)
from scaleprop.calibration.channels import difficulty, relative_difficulty
from scaleprop.formats import quantize
from scaleprop.passes.base import PROVENANCE, Program, Provenance
from scaleprop.passes.statistics import Measured, own_random_state
from scaleprop.report.records import TensorRecord, TransformRecord

Node = torch.fx.Node

_SMALL = 1 << 16  # elements up to which a tensor is kept: constants belong to the graph alone


@dataclasses.dataclass(frozen=True)
class Origin:
    """A captured graph, and references to its tensors that let go of them: target → (tensor or
    reference, how often it had been written to)."""

    graph: torch.fx.Graph
    tensors: Mapping[str, tuple[Any, int]]

    @classmethod
    def of(cls, captured: Program) -> Origin:
        """Of a captured program."""
        module = captured.fork().module
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        tensors: dict[str, tuple[Any, int]] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = get_tensor(module, node)
                held = tensor if tensor.numel() <= _SMALL else weakref.ref(tensor)
                tensors[str(node.target)] = held, tensor._version
        return cls(graph, tensors)

    def module(self) -> torch.fx.GraphModule | None:
        """The graph with its tensors; None where one is gone, or was written to since."""
        found: dict[str, Any] = {}
        for target, (held, version) in self.tensors.items():
            tensor = held() if isinstance(held, weakref.ref) else held
            if tensor is None or tensor._version != version:
                return None
            found[target] = tensor
        return torch.fx.GraphModule(found, self.graph)


def readers_of(transforms: Sequence[TransformRecord]) -> frozenset[str]:
    """The operators that read what was transformed."""
    return frozenset(reader for record in transforms if record.refused is None
                     for reader in record.readers)


def with_effects(
    program: Program, origin: Origin | None, numbers: Numbers
) -> tuple[TransformRecord, ...]:
    """The transforms of ``program`` with ``before`` and ``after``; see ``TransformRecord``."""
    readers = readers_of(program.transforms)
    module = origin.module() if origin is not None and readers else None
    before = {} if module is None else _before(program, module, readers)
    # a static scale fits the model that was calibrated: of the other one it would say nothing
    static = {record.node for record in program.records if record.scale_kind == "static"}
    after = {name: _figures(numbers.read[name], numbers.magnitudes.get(name),
                            None if name in static else numbers.rounded.get(name))
             for name in readers if name in numbers.read}
    return tuple(
        dataclasses.replace(record, before=_worst(record, before), after=_worst(record, after))
        if record.refused is None else record for record in program.transforms)


def _figures(
    seen: Measured, magnitudes: torch.Tensor | None, rounded: Rounded | None
) -> dict[str, float]:
    found = {} if seen.kurtosis is None else {"kurtosis": seen.kurtosis}
    if magnitudes is not None:
        found["difficulty"] = difficulty(magnitudes)
        found["relative_difficulty"] = relative_difficulty(magnitudes)
    if rounded is not None:
        found["sqnr_db"] = rounded.sqnr_db
    return found


def _worst(
    record: TransformRecord, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Of all readers: the largest figures, and the smallest SQNR."""
    found: dict[str, list[float]] = {}
    for reader in record.readers:
        for name, value in figures.get(reader, {}).items():
            found.setdefault(name, []).append(value)
    return {name: (min if name == "sqnr_db" else max)(values) for name, values in found.items()}


def _before(
    program: Program, module: torch.fx.GraphModule, readers: frozenset[str]
) -> dict[str, dict[str, float]]:
    """Reader → what its activation was in the model that was given."""
    captured = {node.name: node for node in module.graph.nodes if node.op == "call_function"}
    records = {record.node: record for record in program.records
               if record.role == "fprop.x" and record.scale_kind == "dynamic"}
    wanted: dict[Node, list[tuple[str, Operand]]] = {}
    for node in program.module.graph.nodes:
        made = node.meta.get(PROVENANCE)
        source = captured.get(made.source if isinstance(made, Provenance) else node.name)
        if node.name in readers and source is not None:
            operand = Operand.of(source)
            if operand.source is not None:
                wanted.setdefault(operand.source, []).append((node.name, operand))
    look = _Sources(module, wanted, records)
    leaves = program.example_leaves
    with torch.no_grad(), own_random_state(module.graph, leaves):
        torch.manual_seed(0)
        look.run(*leaves, enable_io_processing=False)
    return look.found


class _Sources(torch.fx.Interpreter):
    """Runs a graph and measures some of its values, each for the operators that read it."""

    def __init__(
        self, module: torch.fx.GraphModule, wanted: Mapping[Node, list[tuple[str, Operand]]],
        records: Mapping[str, TensorRecord],
    ) -> None:
        super().__init__(module)
        self.found: dict[str, dict[str, float]] = {}
        self._wanted, self._records = wanted, records

    def run_node(self, n: Node) -> Any:
        """The node's value, after a look at it."""
        value = super().run_node(n)
        for reader, operand in self._wanted.get(n, ()):
            record = self._records.get(reader)
            rounded = None if record is None else Rounded.of(
                value, quantize(value, record.format or ""))
            self.found[reader] = _figures(
                Measured.of(value), channel_magnitudes(value, operand.axis), rounded)
        return value
