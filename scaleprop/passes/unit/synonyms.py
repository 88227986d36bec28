"""Operators that are others by another name, or with other arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from scaleprop.passes.unit.writer import Writer

aten: Any = torch.ops.aten


def spell_synonyms(graph: torch.fx.Graph) -> int:
    """Write them as what has a rule, in place; how many."""
    count = 0
    for node in list(graph.nodes):
        spell = _SYNONYMS.get(node.target) if node.op == "call_function" else None
        if spell is not None and not node.args[0].meta["val"].is_complex():
            node.replace_all_uses_with(spell(Writer(graph, node), *node.args))
            graph.erase_node(node)
            count += 1
    return count


def _transposed(write: Writer, x: torch.fx.Node, one: int = -2, other: int = -1) -> torch.fx.Node:
    return write(aten.transpose.int, x, one, other)


def _reversed(write: Writer, x: torch.fx.Node) -> torch.fx.Node:
    return write(aten.permute.default, x, list(reversed(range(x.meta["val"].dim()))))


def _moved(write: Writer, x: torch.fx.Node, source: Any, target: Any) -> torch.fx.Node:
    rank = x.meta["val"].dim()
    sources, targets = ([place % rank for place in (given if isinstance(given, list) else [given])]
                        for given in (source, target))
    left = iter(axis for axis in range(rank) if axis not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return write(aten.permute.default, x,
                 [placed[axis] if axis in placed else next(left) for axis in range(rank)])


def _expanded(write: Writer, x: torch.fx.Node, like: torch.fx.Node) -> torch.fx.Node:
    rank = like.meta["val"].dim()
    return write(aten.expand.default, x, [write.size(like, axis) for axis in range(rank)])


_SYNONYMS: dict[Any, Callable[..., torch.fx.Node]] = {
    aten.mT.default: _transposed,
    aten.mH.default: _transposed,
    aten.adjoint.default: _transposed,
    aten.swapdims.default: _transposed,
    aten.numpy_T.default: _reversed,
    aten.matrix_H.default: _reversed,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
    aten.moveaxis.int: _moved,
    aten.moveaxis.intlist: _moved,
    aten.expand_as.default: _expanded,
    aten.broadcast_to.default: lambda write, x, size: write(aten.expand.default, x, size),
    aten.ravel.default: lambda write, x: write(aten.reshape.default, x, [-1]),
    aten.linalg_matmul.default: lambda write, x, y: write(aten.matmul.default, x, y),
}
