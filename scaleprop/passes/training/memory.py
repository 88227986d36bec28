"""What a graph reads of operands besides the data: which row of which input holds whose amax, that
is carried from step to step, and whose stream of random numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx

from scaleprop.errors import CaptureError

aten: Any = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Row:
    """One amax: whose, ``layer/role``; and how it is scaled, as ``Operand.scaling`` says."""

    name: str
    scaling: str


@dataclasses.dataclass
class Memory:
    """Three inputs of a graph, float32 [capacity], one row an operand that is not scaled by current
    data.

    used: the amax to use; 0 for that of this step's data. seen, forward and backward: where the
    amax of this step's data is written to, in a graph that has gradients.
    """

    used: torch.fx.Node
    seen: tuple[torch.fx.Node, torch.fx.Node]
    rows: list[Row] = dataclasses.field(default_factory=list[Row])
    _written: tuple[dict[int, torch.fx.Node], dict[int, torch.fx.Node]] = dataclasses.field(
        default_factory=lambda: ({}, {}))

    @property
    def capacity(self) -> int:
        return int(self.used.meta["val"].shape[0])

    def row(self, name: str, scaling: str) -> int:
        """The row of a new operand.

        Raises:
            CaptureError: where there is none left.
        """
        if len(self.rows) == self.capacity:
            raise CaptureError(f"{name}: more than {self.capacity} operands of this graph carry "
                               "an amax. Remedy: scaling='current'")
        self.rows.append(Row(name, scaling))
        return len(self.rows) - 1

    def saw(self, row: int, amax: torch.fx.Node, *, backward: bool) -> None:
        """Have the amax of this step, float32 [1], written to its row."""
        self._written[backward][row] = amax

    def write(self, graph: torch.fx.Graph, call: Any) -> None:
        """Write what was seen, once each way, at the end of the graph.

        call: makes a node, of an operator and its arguments, before the node that it is given.
        """
        end = graph.output_node()
        for seen, rows, tag in zip(self.seen, self._written,
                                   ("must_be_in_forward", "must_be_in_backward"), strict=True):
            if not rows:
                continue
            parts: list[Any] = []
            for row in range(len(self.rows)):
                parts.append(rows[row] if row in rows else call(
                    aten.slice.Tensor, (seen, 0, row, row + 1), seen, end))
            if len(self.rows) < self.capacity:
                parts.append(call(aten.slice.Tensor, (seen, 0, len(self.rows), self.capacity),
                                  seen, end))
            whole = call(aten.cat.default, (parts,), seen, end)
            # partitioning tells a write to an input from a value by this
            call(aten.copy_.default, (seen, whole), seen, end).meta["partitioner_tag"] = tag


@dataclasses.dataclass
class Streams:
    """An input of a graph, int64 [2·capacity]: for each operand that draws random numbers its
    stream, and a number that nothing reads: GPUs' code expects inputs to begin at 16 bytes.

    As data, not as constants: code for operands of one shape is then the same.
    """

    table: torch.fx.Node
    numbers: list[int] = dataclasses.field(default_factory=list[int])

    def of(self, number: int, name: str, call: Any) -> torch.fx.Node:
        """A stream, int64 [1]; ``call`` makes nodes, of operators and their arguments.

        Raises:
            CaptureError: where there is no row left.
        """
        place, capacity = 2 * len(self.numbers), self._size() // 2
        if len(self.numbers) == capacity:
            raise CaptureError(f"{name}: more than {capacity} operands of this graph draw random "
                               "numbers. Remedy: rounding='nearest'")
        self.numbers.append(number)
        return call(aten.slice.Tensor, (self.table, 0, place, place + 1))

    def values(self, device: torch.device) -> torch.Tensor:
        """The input."""
        found = torch.zeros(self._size(), dtype=torch.int64)
        found[:2 * len(self.numbers):2] = torch.tensor(self.numbers, dtype=torch.int64)
        return found.to(device)

    def _size(self) -> int:
        return int(self.table.meta["val"].shape[0])
