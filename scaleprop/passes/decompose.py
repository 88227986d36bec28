"""Bring an exported graph to core ATen, with the composites kept whole.

``ExportedProgram.run_decompositions`` traces the whole model again, half of the time of a capture.
Most graphs need it for a few operators only (``transpose``, ``reshape``, ``to``), so each such node
is traced by itself and replaced by what it becomes; calls that look alike are traced once. A graph
that writes to tensors in place, or that holds other graphs, takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from scaleprop import _torch_compat as compat

Table = dict[Any, Callable[..., Any]]  # operator → its decomposition


def decomposed(exported: ExportedProgram) -> tuple[ExportedProgram, torch.fx.GraphModule]:
    """The program whose signature holds, and its flat module with parameters as ``get_attr``."""
    if all(_is_simple(node) for node in exported.graph.nodes):
        module = exported.module(check_guards=False)
        with torch.no_grad(), compat.fake_mode_of(module.graph):
            respell(module, compat.decomposition_table(), compat.is_decomposed)
        return exported, module
    flat = compat.decompose(exported)
    return flat, flat.module(check_guards=False)


def _is_simple(node: torch.fx.Node) -> bool:
    """Whether a node neither writes to tensors nor holds a graph of its own."""
    if node.op != "call_function":
        return node.op != "call_module"
    if isinstance(node.target, compat.OpOverload):
        return not node.target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]
    return not isinstance(node.target, compat.OperatorBase)


def respell(
    module: torch.fx.GraphModule, table: Table, chosen: Callable[[Any, Table], bool]
) -> None:
    """Replace, in place, each call whose operator is ``chosen`` by what ``table`` makes of it.

    To be called under the graph's fake mode. Names, sizes and source lines stay.
    """
    traced: dict[Any, torch.fx.GraphModule] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and chosen(node.target, table):
            key = _likeness(node)
            if key not in traced:
                traced[key] = _traced(node, table)
            _inline(module, node, traced[key])
    module.graph.eliminate_dead_code()
    module.recompile()


def _leaves(node: torch.fx.Node) -> tuple[list[Any], pytree.TreeSpec, list[torch.fx.Node]]:
    """A node's arguments, flat; how they were nested; and those that are nodes."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    return flat, spec, [leaf for leaf in flat if isinstance(leaf, torch.fx.Node)]


def _likeness(node: torch.fx.Node) -> Any:
    """Equal for calls that trace to the same graph: operator, constants, and what inputs are."""
    flat, spec, inputs = _leaves(node)
    # 1, 1.0 and True are equal, but not alike
    constants = [None if isinstance(leaf, torch.fx.Node) else f"{type(leaf)} {leaf!r}"
                 for leaf in flat]
    repeats = tuple(inputs.index(leaf) for leaf in inputs)
    kinds = tuple(_kind(leaf.meta["val"]) for leaf in inputs)
    return node.target, spec, tuple(constants), repeats, kinds


def _kind(value: Any) -> Any:
    """What tracing can see of a value. A parameter is itself: tracing may fold it."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value)} {value}"
    if not compat.is_fake(value):
        return id(value)
    return (value.dtype, value.device, str(value.shape), str(value.stride()),
            str(value.storage_offset()))


def _traced(node: torch.fx.Node, table: Table) -> torch.fx.GraphModule:
    flat, spec, inputs = _leaves(node)

    def call(*values: Any) -> Any:
        given = iter(values)
        leaves = [next(given) if isinstance(leaf, torch.fx.Node) else leaf for leaf in flat]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return compat.trace(call, [leaf.meta["val"] for leaf in inputs], table)


def _inline(
    module: torch.fx.GraphModule, node: torch.fx.Node, inner: torch.fx.GraphModule
) -> None:
    *_, inputs = _leaves(node)
    placeholders = inner.graph.find_nodes(op="placeholder")
    copies: dict[torch.fx.Node, torch.fx.Node] = dict(zip(placeholders, inputs, strict=True))
    with module.graph.inserting_before(node):
        for part in inner.graph.nodes:
            if part.op in ("placeholder", "output"):
                continue
            copy = module.graph.node_copy(part, copies.__getitem__)
            if part.op == "get_attr":  # a constant that the operator made
                name = f"_{node.name}_{part.target}"
                module.register_buffer(name, getattr(inner, str(part.target)))
                copy.target = name
            copy.meta = {**node.meta}
            # a value tells nodes apart when they are traced again
            copy.meta["val"] = pytree.tree_map(_own, part.meta.get("val"))
            copy.meta.pop("tensor_meta", None)
            copies[part] = copy
    result = torch.fx.map_arg(inner.graph.output_node().args[0], copies.__getitem__)
    _replace(module.graph, node, result)


def _own(value: Any) -> Any:
    return value.detach() if compat.is_fake(value) else value


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, result: Any) -> None:
    if isinstance(result, torch.fx.Node):
        node.replace_all_uses_with(result)
    else:  # an operator with several results: its users pick theirs
        for user in list(node.users):
            part = result[user.args[1]]
            if isinstance(part, torch.fx.Node):  # else a gradient that nobody asked for
                user.replace_all_uses_with(part)
            graph.erase_node(user)
    graph.erase_node(node)
