"""Which matrix products of a joint graph are the forward, input-gradient and weight-gradient ones.

Told from the graph alone: which values depend on a gradient, and which are a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
import torch.fx

from scaleprop._torch_compat import OpOverload
from scaleprop.passes.exponents.facts import is_float
from scaleprop.rules import contraction_behind, rule_for

aten: Any = torch.ops.aten

Role = Literal["fprop", "dgrad", "wgrad"]
# operator → the places of its two factors
FACTORS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
# contractions that are no products of two matrices → why they and their gradients stay high
_KINDS = {
    "matmul": "a batch of products: only single matrices run in low precision",
    "attention": "attention runs in high precision",
    "linear": "not brought to a product of matrices",
    "conv": "a convolution: only products of matrices run in low precision",
}
CONVOLUTION, BATCHED = _KINDS["conv"], _KINDS["matmul"]


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a product: ``root``, moved by ``moves`` in that order.

    kind: ``x`` an activation, ``w`` a parameter, ``dy`` a gradient.
    """

    root: torch.fx.Node
    moves: tuple[torch.fx.Node, ...]
    kind: Literal["x", "w", "dy"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of two factors."""

    node: torch.fx.Node
    role: Role
    left: Factor
    right: Factor


@dataclasses.dataclass(frozen=True)
class Products:
    """Products that can run in low precision, and why the others cannot."""

    found: tuple[Product, ...]
    high: Mapping[torch.fx.Node, str]


def find_products(graph: torch.fx.Graph, parameters: Collection[torch.fx.Node]) -> Products:
    """The products of a linear layer's forward and backward.

    parameters: the graph's inputs that are parameters. Forward: one factor is a parameter.
    Input gradient: of a gradient with such a parameter. Weight gradient: of a gradient with what
    was multiplied by one.
    """
    gradients = gradient_values(graph)
    found: list[Product] = []
    high: dict[torch.fx.Node, str] = {}
    activations: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target not in FACTORS:
            if why := _no_matrix_product(node, parameters):
                high[node] = why
            continue
        if not is_float(node.meta["val"]):
            high[node] = f"its numbers are {node.meta['val'].dtype}, which has no scale"
            continue
        if any(factor != 1 for factor in node.kwargs.values()):
            high[node] = "addmm with alpha or beta"
            continue
        sides = [source_of(node.args[place]) for place in FACTORS[node.target]]
        depends = [root in gradients for root, _ in sides]
        weights = [parameter_of(root) in parameters for root, _ in sides]
        role: Role
        if not any(depends):
            if weights[0] == weights[1]:
                are = "both factors are" if weights[0] else "neither factor is"
                high[node] = f"{are} a parameter"
                continue
            role = "fprop"
            activations.update(root for (root, _), is_weight in zip(sides, weights, strict=True)
                               if not is_weight)
        elif all(depends):
            high[node] = "both factors depend on gradients"
            continue
        else:
            other = depends.index(False)
            if not weights[other] and sides[other][0] not in activations:
                high[node] = "a gradient of attention, or of another product of activations"
                continue
            role = "dgrad" if weights[other] else "wgrad"
        factors = [Factor(root, moves, "dy" if depend else "w" if weight else "x")
                   for (root, moves), depend, weight in zip(sides, depends, weights, strict=True)]
        found.append(Product(node, role, *factors))
    return Products(tuple(found), high)


def _no_matrix_product(node: torch.fx.Node, parameters: Collection[torch.fx.Node]) -> str:
    """Why another sum of products stays high; "" where a node is none, or a lookup."""
    contraction = contraction_behind(node)
    if contraction is not None:
        return _KINDS.get(contraction.kind, "")
    known = not isinstance(node.target, OpOverload) or rule_for(node.target) is not None
    matrices = [] if known else [value for value in node.all_input_nodes if value in parameters
                                 and value.meta["val"].ndim > 1]
    return f"{node.target}, of which nothing is known, reads a matrix" if matrices else ""


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a gradient that comes in from outside: AOTAutograd names them so."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def gradient_values(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """What depends on the gradients that come in from outside."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def source_of(node: Any) -> tuple[torch.fx.Node, tuple[torch.fx.Node, ...]]:
    """The value that ``node`` is moved from, and the moves."""
    moves: list[torch.fx.Node] = []
    while node.op == "call_function" and (rule := rule_for(node.target)) and rule.moves:
        moves.append(node)
        node = node.args[0]
    return node, tuple(reversed(moves))


def parameter_of(node: torch.fx.Node) -> torch.fx.Node:
    """The input that ``node`` is, moves and casts undone."""
    while node.op == "call_function" and node.target is aten._to_copy.default:
        node = source_of(node.args[0])[0]
    return node
