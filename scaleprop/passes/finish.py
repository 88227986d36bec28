"""Finish: the last look at a program before a backend gets it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.errors import PostconditionError, describe
from scaleprop.passes.assign import ASSIGNMENT
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.dimensions import spell, symbol_names
from scaleprop.passes.provenance import with_neighbours
from scaleprop.passes.rewrite import Rewriter


@dataclasses.dataclass(frozen=True)
class Finish(Pass):
    """Drop dead nodes, unread tensors and pass-private metadata; put records in graph order."""

    name: ClassVar[str] = "finish"
    preserves_function: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The program as backends take it."""
        rewriter = Rewriter(program, self.name)
        rewriter.modified = True
        result = rewriter.finish()
        for node in result.module.graph.nodes:
            node.meta.pop(ASSIGNMENT, None)
        place = {node.name: index for index, node in enumerate(result.module.graph.nodes)}
        names = symbol_names(result)
        records = [
            dataclasses.replace(record, shape=tuple(
                spell(size, names) if isinstance(size, str) else size for size in record.shape))
            for record in sorted(result.records, key=lambda r: place.get(r.node, len(place)))
        ]
        records = with_neighbours(records, result.transforms)
        return PassResult(result.replace(records=records), True)

    def ensures(self, program: Program) -> None:
        """Every node has a fake value, and every record belongs to a node."""
        names: set[str] = set()
        for node in program.module.graph.nodes:
            names.add(node.name)
            if node.op != "output" and "val" not in node.meta:
                raise PostconditionError(f"{describe(node)} has no fake value")
        unread = {name for name, _ in _tensors(program.module)} - {
            str(node.target) for node in program.module.graph.nodes if node.op == "get_attr"
        }
        if unread:
            raise PostconditionError(f"nothing reads the tensors {sorted(unread)}")
        lost = sorted({record.node for record in program.records} - names)
        if lost:
            raise PostconditionError(f"records of nodes that are not in the graph: {lost[:5]}")


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
