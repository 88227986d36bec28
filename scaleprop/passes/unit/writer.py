"""Operators spelled out: calls written before a node, with traced values."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop.passes.dimensions import is_symbolic
from scaleprop.passes.unit.checkpoints import REGION

aten: Any = torch.ops.aten

INHERITED = ("stack_trace", "nn_module_stack", REGION)


class Writer:
    """Writes calls before a node, with traced values."""

    def __init__(self, graph: torch.fx.Graph, at: torch.fx.Node) -> None:
        self._graph, self._at = graph, at

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        with self._graph.inserting_before(self._at):
            node = self._graph.call_function(target, args, kwargs)
        given: Any = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[arg-type]
        fake: Any = self._at.meta["val"]
        with fake.fake_mode, torch.no_grad():
            value = target(*given[0], **given[1])
        node.meta = {key: self._at.meta[key] for key in INHERITED if key in self._at.meta}
        node.meta["val"] = value
        return node

    def size(self, x: torch.fx.Node, axis: int) -> Any:
        """The size of an axis: a number, or a node where it may vary."""
        size = x.meta["val"].shape[axis]
        return self(aten.sym_size.int, x, axis) if is_symbolic(size) else int(size)
