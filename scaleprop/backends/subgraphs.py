"""Equal pieces of a graph, compiled once.

A model of many layers quantizes many matrices of few shapes. Spelled out in ATen they would be all
that a compiler sees: hundreds of operators each, thousands a model. Here a piece is one call of a
graph of its own, which those of equal operators, constants and inputs share.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.passes.decompose import Table

# large once spelled out, and no layer has but one
PIECES = frozenset({ops.quantize_operand, ops.eden_operand, ops.random_bits, ops.rotate,
                    ops.unrotate, ops.softened, ops.estimate})  # fmt: skip
_GET: Any = operator.getitem
MANY = 200  # pieces of a graph: spelled out, they take minutes to compile
Piece = list[torch.fx.Node]  # in the graph's order; what users outside read is of the last


def is_worth_sharing(graph: torch.fx.Graph) -> bool:
    """Whether a graph has so many pieces that time to compile counts for more than that nothing is
    fused across their borders. Graphs of symbolic sizes are not shared."""
    pieces = sum(len(graph.find_nodes(op="call_function", target=target)) for target in PIECES)
    return pieces >= MANY and not _is_symbolic(graph)


def _is_symbolic(graph: torch.fx.Graph) -> bool:
    """Whether an input has a size that is known only when the graph runs."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    sizes = [size for value in values
             for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
    return any(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None
               for size in sizes)


def share(module: torch.fx.GraphModule, table: Table) -> None:
    """Replace, in place, the calls of ``PIECES`` by calls of graphs in ATen, spelled by ``table``.

    To be called under the graph's fake mode, on a graph without symbolic sizes.
    """
    made: dict[Any, str] = {}
    for piece in _pieces(module.graph):
        inputs = list(dict.fromkeys(
            source for node in piece for source in node.all_input_nodes if source not in piece))
        key = _likeness(piece, inputs)
        if key not in made:
            made[key] = f"scaleprop_piece_{len(made)}"
            traced = compat.trace(_running(piece, inputs), [_value(node) for node in inputs], table)
            module.add_submodule(made[key], traced)
        _replace(module.graph, piece, inputs, made[key])
    module.graph.eliminate_dead_code()
    module.recompile()


def _pieces(graph: torch.fx.Graph) -> list[Piece]:
    """Calls with what is made for them alone: random bits, rotations."""
    piece_of: dict[torch.fx.Node, Piece] = {}
    found: list[Piece] = []
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.target not in PIECES:
            continue
        readers = {id(piece_of[user]) if user in piece_of else None for user in node.users}
        if len(readers) == 1 and None not in readers:
            piece = piece_of[next(iter(node.users))]
            piece.insert(0, node)
        else:
            piece = [node]
            found.append(piece)
        piece_of[node] = piece
    return found[::-1]


def _likeness(piece: Piece, inputs: Sequence[torch.fx.Node]) -> Any:
    """Equal for pieces that trace to the same graph."""
    places = {node: ("input", place) for place, node in enumerate(inputs)}
    places |= {node: ("node", place) for place, node in enumerate(piece)}

    def spelled(argument: Any) -> str:
        named = torch.fx.map_arg(argument, lambda node: places[node])  # type: ignore[arg-type,return-value]
        return repr(named)

    calls = tuple((node.target, spelled(node.args), spelled(node.kwargs)) for node in piece)
    kinds = tuple((value.dtype, value.device, tuple(value.shape), value.stride())
                  for value in map(_value, inputs))
    return calls, kinds


def _value(node: torch.fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _running(piece: Piece, inputs: Sequence[torch.fx.Node]) -> Any:
    """A function of the inputs' values that gives the last node's results, in a tuple."""

    def run(*values: torch.Tensor) -> tuple[Any, ...]:
        known: dict[torch.fx.Node, Any] = dict(zip(inputs, values, strict=True))
        result: Any = None
        for node in piece:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[arg-type]
            result = known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, tuple) else (result,)

    return run


def _replace(
    graph: torch.fx.Graph, piece: Piece, inputs: Sequence[torch.fx.Node], name: str
) -> None:
    last = piece[-1]
    value = last.meta["val"]
    several = isinstance(value, (tuple, list))
    with graph.inserting_before(last):
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph,
                                   (graph.get_attr(name), name, *inputs))
        call.meta = {**last.meta, "val": tuple(value) if several else (value,)}
        result = call
        if not several:
            result = graph.call_function(_GET, (call, 0))
            result.meta = dict(last.meta)
    last.replace_all_uses_with(result)
    for node in reversed(piece):
        graph.erase_node(node)
