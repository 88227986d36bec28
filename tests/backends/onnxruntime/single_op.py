"""One ATen operator as a program: static, and with every axis of size ``SMALL`` dynamic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from scaleprop.passes.base import Program

SMALL, LARGE = 5, 7


Case = Callable[[int], tuple[Any, tuple[Any, ...], dict[str, Any]]]


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a pytree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def program_of(case: Case, dynamic: bool) -> tuple[Program, list[torch.Tensor]]:
    """A program that calls the operator once, and its flat inputs."""
    op, args, kwargs = case(SMALL)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = torch.fx.Graph()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = tensor_leaves(leaves)
    nodes: list[Any] = []
    for index, tensor in enumerate(tensors):
        node = graph.placeholder(f"x{index}")
        node.meta["val"] = _fake(mode, tensor, dynamic)
        nodes.append(node)
    remaining = iter(nodes)
    replaced = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    call_args, call_kwargs = pytree.tree_unflatten(replaced, spec)
    call = graph.call_function(op, call_args, call_kwargs)
    fake_args, fake_kwargs = map_arg(
        (call_args, call_kwargs), lambda node: node.meta["val"])
    with mode:
        call.meta["val"] = op(*fake_args, **fake_kwargs)
    graph.output(_outputs(graph, call))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    in_spec = pytree.tree_structure((tuple(tensors), {}))
    out_spec = pytree.tree_structure(pytree.tree_map(lambda _: 0, call.meta["val"]))
    return Program(module=module, in_spec=in_spec, out_spec=out_spec,
                   example_args=tuple(tensors), example_kwargs={}), tensors


def _outputs(graph: torch.fx.Graph, call: torch.fx.Node) -> Any:
    meta = call.meta["val"]
    if not isinstance(meta, (list, tuple)):
        return call
    parts = []
    for index, value in enumerate(meta):
        part = graph.call_function(operator.getitem, (call, index))
        part.meta["val"] = value
        parts.append(part)
    return tuple(parts)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, dynamic: bool) -> torch.Tensor:
    if not dynamic:
        return mode.from_tensor(tensor, static_shapes=True)
    sizes = [DimDynamic.DUCK if size == SMALL else DimDynamic.STATIC for size in tensor.shape]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
