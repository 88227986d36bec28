"""What a forward graph is made of: products with parameters, residual streams, the readout.

Told from the graph alone: which value is a parameter, which depends on which.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.fx

from scaleprop._torch_compat import OpOverload
from scaleprop.rules import Contraction, Operand, contraction_of, rule_for

aten: Any = torch.ops.aten

Branch = Literal["attention", "mlp"]

_ADDS = (aten.add.Tensor,)
_PARTS = (aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
          aten.chunk.default, aten.unbind.int, operator.getitem)
_PICKS = (aten.index.Tensor, aten.index_select.default)
_GROUPED = "grouped_mm"  # aten::_grouped_mm, and what libraries put in its place
_GROUPED_PRODUCT = Contraction(
    "matmul", (Operand(0, "activation", (-1,)), Operand(1, "activation", (-2,))))
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a value with a parameter.

    activation, weight, bias: places among the node's arguments; None where there is none (a lookup
        has no activation, and most products no bias).
    parameter: the ``get_attr`` node that the weight is.
    fan_in: how many products are summed for one element of the result. fan_out: how many elements
        of the result the parameter has, per position.
    """

    node: torch.fx.Node
    activation: int | None
    weight: int
    bias: int | None
    parameter: torch.fx.Node
    fan_in: int
    fan_out: int


@dataclasses.dataclass(frozen=True)
class Residual:
    """A sum of a stream and of a branch that reads the stream.

    skip: the stream's place among the sum's arguments. branch: what the other term is made with.
    index: how many branches the stream took before. stream: which one, by number.
    """

    node: torch.fx.Node
    skip: int
    branch: Branch
    index: int
    stream: int


@dataclasses.dataclass(frozen=True)
class Structure:
    """products, residuals: by node. readouts: products whose result reaches the output through no
    other. first: products of values that no parameter had a part in. inside: how many branches the
    stream has, for products inside of one."""

    signals: frozenset[torch.fx.Node]
    products: Mapping[torch.fx.Node, Product]
    residuals: Mapping[torch.fx.Node, Residual]
    readouts: frozenset[torch.fx.Node]
    first: frozenset[torch.fx.Node]
    inside: Mapping[torch.fx.Node, int]

    def length(self, stream: int) -> int:
        """How many branches a stream has."""
        return sum(residual.stream == stream for residual in self.residuals.values())


def find_structure(module: torch.fx.GraphModule) -> Structure:
    """The structure of a forward graph; nodes carry traced values."""
    graph = module.graph
    parameters = _parameters(module)
    products = {node: product for node in graph.nodes
                if (product := _product(node, parameters)) is not None}
    reach = _Reach(graph)
    signals = find_signals(module)
    residuals, inside = _residuals(graph, products, signals, reach)
    return Structure(
        signals, products, residuals,
        readouts=frozenset(_readouts(graph, products, residuals, reach)),
        first=frozenset(node for node, product in products.items()
                        if product.activation is None or not any(
                            reach.follows(node.args[product.activation], other)
                            or node.args[product.activation] is other for other in products)),
        inside=inside,
    )


def attribute(module: torch.nn.Module, node: torch.fx.Node) -> Any:
    """What a ``get_attr`` node gets."""
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name)


def is_float(node: Any) -> bool:
    """Whether a node's value is a floating-point tensor."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _parameters(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    return {node for node in module.graph.find_nodes(op="get_attr")
            if isinstance(attribute(module, node), torch.nn.Parameter)}


def find_signals(module: torch.fx.GraphModule) -> frozenset[torch.fx.Node]:
    """Float values that parameters or the inputs' floats had a part in; no masks, no positions."""
    parameters = _parameters(module)
    found: set[torch.fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        is_source = node in parameters or (node.op == "placeholder" and is_float(node))
        if is_source or any(source in found for source in node.all_input_nodes):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.is_floating_point():
                found.add(node)
    return frozenset(found)


class _Reach:
    """Which node depends on which, as one bit set a node."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._bit = {node: 1 << place for place, node in enumerate(graph.nodes)}
        self._before: dict[torch.fx.Node, int] = {}
        for node in graph.nodes:
            before = 0
            for source in node.all_input_nodes:
                before |= self._before[source] | self._bit[source]
            self._before[node] = before

    def follows(self, node: Any, source: torch.fx.Node) -> bool:
        """Whether ``node`` depends on ``source``."""
        return isinstance(node, torch.fx.Node) and bool(self._before[node] & self._bit[source])


def taken_from(node: Any) -> Any:
    """The value that ``node`` is a view, copy or cast of, of all or of a part: one of the matrices
    of a stack, one of the projections that are held as one."""
    while isinstance(node, torch.fx.Node) and node.op == "call_function" and node.args:
        rule = rule_for(node.target)
        passes = rule is not None and (rule.moves or rule.family == "cast")
        if not passes and node.target not in _PARTS and not _picks_matrices(node):
            break
        node = node.args[0]
    return node


def _picks_matrices(node: torch.fx.Node) -> bool:
    """Whether ``node`` picks matrices from a stack by number, not rows from a table."""
    stack: Any = node.args[0]
    return node.target in _PICKS and stack.meta["val"].dim() > 2


def product_contraction(node: torch.fx.Node) -> Contraction | None:
    """What ``node`` contracts, also where it is an operator of grouped products that some library
    defines: rows x[t, k], each times the matrix of its group, of w[group, k, n]."""
    found = contraction_of(node)
    name = node.target.name() if isinstance(node.target, OpOverload) else ""
    if found is None and _GROUPED in name and "backward" not in name and len(node.args) > 1:
        values = [arg.meta.get("val") for arg in node.args[:2] if isinstance(arg, torch.fx.Node)]
        if [value.dim() for value in values if isinstance(value, torch.Tensor)] == [2, 3]:
            return _GROUPED_PRODUCT
    return found


def _product(node: torch.fx.Node, parameters: set[torch.fx.Node]) -> Product | None:
    contraction = product_contraction(node)
    if contraction is None or contraction.kind == "attention":
        return None
    operands = [operand for operand in contraction.operands if operand.role != "bias"]
    bias = contraction.operand("bias")
    weights = [operand for operand in operands if taken_from(node.args[operand.argument])
               in parameters]
    if len(weights) > 1:  # a learned value times a weight
        weights = [operand for operand in weights if operand.role == "weight"]
    if len(weights) != 1 or len(operands) > 2:
        return None
    weight: Any = node.args[weights[0].argument]
    if contraction.kind != "embedding" and weight.meta["val"].dim() < 2:
        return None
    others = [operand.argument for operand in operands if operand is not weights[0]]
    has_bias = bias is not None and len(node.args) > bias.argument \
        and node.args[bias.argument] is not None
    shape = weight.meta["val"].shape
    fan_in = math.prod(int(shape[axis]) for axis in weights[0].axes)
    return Product(
        node, activation=others[0] if others else None, weight=weights[0].argument,
        bias=bias.argument if has_bias and bias is not None else None,
        parameter=taken_from(weight), fan_in=fan_in,
        fan_out=int(shape[-1]) if not others else _matrix_size(node, contraction, weight) // fan_in,
    )


def _matrix_size(node: torch.fx.Node, contraction: Contraction, weight: torch.fx.Node) -> int:
    """How many elements of a weight one position is multiplied with: a matrix of a stack where
    positions are stacked as well, or grouped."""
    shape = weight.meta["val"].shape
    ranks = [node.args[operand.argument].meta["val"].dim()  # type: ignore[union-attr]
             for operand in contraction.operands if operand.role != "bias"]
    is_stack = contraction.kind == "matmul" and (min(ranks) > 2 or contraction is _GROUPED_PRODUCT)
    return math.prod(shape[-2:] if is_stack else shape)


def _identity(node: torch.fx.Node) -> list[torch.fx.Node]:
    """``node`` and what it is a view, copy, cast or dropout of, outwards in."""
    chain = [node]
    while node.op == "call_function" and node.args and isinstance(node.args[0], torch.fx.Node):
        rule = rule_for(node.target)
        passes = rule is not None and (rule.moves or rule.family == "cast")
        if not passes and node.target not in _DROPOUTS:
            break
        node = node.args[0]
        chain.append(node)
    return chain


def _residuals(
    graph: torch.fx.Graph, products: Mapping[torch.fx.Node, Product],
    signals: frozenset[torch.fx.Node], reach: _Reach,
) -> tuple[dict[torch.fx.Node, Residual], dict[torch.fx.Node, int]]:
    found: dict[torch.fx.Node, Residual] = {}
    members: dict[torch.fx.Node, int] = {}
    streams = 0
    for node in graph.find_nodes(op="call_function", target=_ADDS[0]):
        terms: Any = node.args[:2]
        if not all(term in signals for term in terms) or node.kwargs.get("alpha", 1) != 1 \
                or terms[0].meta["val"].shape != terms[1].meta["val"].shape:
            continue
        for skip in (0, 1):
            source, inner = _split(_stream(terms[skip], found), terms[1 - skip], products, reach)
            if source is None:
                continue
            before = found.get(_identity(terms[skip])[-1])
            stream = streams if before is None else before.stream
            streams += before is None
            index = 0 if before is None else before.index + 1
            attends = any(_attends(other, source, terms[1 - skip], reach) for other in graph.nodes)
            found[node] = Residual(node, skip, "attention" if attends else "mlp", index, stream)
            members.update(dict.fromkeys(inner, stream))
            break
    lengths = {stream: sum(r.stream == stream for r in found.values()) for stream in range(streams)}
    return found, {node: lengths[stream] for node, stream in members.items()}


def _stream(skip: torch.fx.Node, found: Mapping[torch.fx.Node, Residual]) -> list[torch.fx.Node]:
    """What a stream was, backwards: branches in parallel read what it was before either."""
    chain = _identity(skip)
    while (before := found.get(chain[-1])) is not None:
        chain += _identity(before.node.args[before.skip])  # type: ignore[arg-type]
    return chain


def _split(
    stream: list[torch.fx.Node], branch: torch.fx.Node, products: Mapping[torch.fx.Node, Product],
    reach: _Reach,
) -> tuple[torch.fx.Node | None, list[torch.fx.Node]]:
    """Where a stream and its branch part, and the products in the branch."""
    for source in stream:
        inner = [node for node, product in products.items() if product.activation is not None
                 and (node is branch or reach.follows(branch, node))
                 and (node.args[product.activation] is source
                      or reach.follows(node.args[product.activation], source))]
        if inner:
            return source, inner
    return None, []


def _attends(
    node: torch.fx.Node, source: torch.fx.Node, branch: torch.fx.Node, reach: _Reach
) -> bool:
    contraction = contraction_of(node)
    rule = rule_for(node.target) if node.op == "call_function" else None
    mixes = (contraction is not None and contraction.kind == "attention") or (
        rule is not None and rule.family == "softmax")
    return mixes and reach.follows(node, source) and reach.follows(branch, node)


def _readouts(
    graph: torch.fx.Graph, products: Mapping[torch.fx.Node, Product],
    residuals: Mapping[torch.fx.Node, Residual], reach: _Reach,
) -> list[torch.fx.Node]:
    """The last products before the output; not one whose result joins a stream."""
    norms = [node for node in graph.nodes
             if (rule := rule_for(node.target)) is not None and rule.family == "norm"]
    later = (*products, *residuals, *norms)
    return [node for node, product in products.items() if product.activation is not None
            and not any(reach.follows(other, node) for other in later)]
