"""What is known before a program runs: weights, and whatever is computed from weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from scaleprop import ops
from scaleprop.ops import IMPLEMENTATIONS

# Folding these never makes a tensor that is larger than a weight in float32.
_FOLDED = {
    ops.dequantize, ops.fake_quantize, ops.hadamard,
    torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.t.default,
    torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.alias.default,
    torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default, torch.ops.aten.detach.default,
}  # fmt: skip


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a ``get_attr`` node of this target reads."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def constants_of(module: torch.fx.GraphModule) -> dict[torch.fx.Node, torch.Tensor]:
    """Every node whose value is a tensor that no input changes: attributes, and what folds."""
    known: dict[torch.fx.Node, torch.Tensor] = {}
    wanted = _needed_folds(module.graph)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(module, str(node.target))
                if isinstance(value, torch.Tensor):
                    known[node] = value.detach()
            elif node in wanted and all(argument in known for argument in node.all_input_nodes):
                known[node] = _evaluate(node, known)
    return known


def _needed_folds(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Foldable nodes of constants only."""
    constant: set[torch.fx.Node] = set()
    folds: set[torch.fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        foldable = node.op == "call_function" and node.target in _FOLDED and bool(inputs)
        if node.op == "get_attr" or (foldable and all(n in constant for n in inputs)):
            constant.add(node)
            if foldable:
                folds.add(node)
    return folds


def _evaluate(node: torch.fx.Node, known: Mapping[torch.fx.Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: known[argument])
    function: Any = IMPLEMENTATIONS.get(node.target, node.target)  # type: ignore[arg-type]
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, function(*args, **kwargs))
