"""The matrices that products read, told apart from the views of them, and whose layer they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.passes.training.roles import (
    FACTORS,
    Factor,
    Product,
    is_tangent,
    parameter_of,
    source_of,
)

aten: Any = torch.ops.aten
_COPY: Any = aten._to_copy.default


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A factor as the product reads it: ``base``, or its transpose.

    base: two axes; tokens are the rows of an activation or a gradient. key: equal for views of the
    same value that are spelled alike. axis: of ``base``, that the product sums over.
    """

    base: torch.fx.Node
    transposed: bool
    key: tuple[Any, ...]
    axis: int


def factor_nodes(product: Product) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The two factors as the product reads them."""
    left, right = FACTORS[product.node.target]
    return product.node.args[left], product.node.args[right]  # type: ignore[return-value]


def matrix_of(node: torch.fx.Node, axis: int) -> Matrix:
    """``node``, whose ``axis`` a product sums over, as a matrix or the transpose of one."""
    transposed = False
    while _is_transpose(node):
        node, transposed = node.args[0], not transposed  # type: ignore[assignment]
    root, moves = source_of(node)
    key = (root, *((move.target, str(move.args[1:]), str(move.kwargs)) for move in moves))
    return Matrix(node, transposed, key, 1 - axis if transposed else axis)


def _is_transpose(node: torch.fx.Node) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    if node.op != "call_function" or len(node.args) == 0:
        return False
    if node.target is aten.t.default:
        return True
    if node.target is aten.permute.default:
        return list(node.args[1]) in ([1, 0], [-1, -2], [1, -2], [-1, 0])  # type: ignore[arg-type]
    if node.target is aten.transpose.int:
        return node.meta["val"].ndim == 2 and node.args[1:] in ((0, 1), (1, 0), (-1, -2), (-2, -1))
    return False


@dataclasses.dataclass(frozen=True)
class Layer:
    """One use of a parameter: its forward product, and the two backward ones that it has.

    name: the parameter's, with a number where it is used again.
    """

    name: str
    fprop: Product
    dgrad: Product | None
    wgrad: Product | None


def find_layers(
    graph: torch.fx.Graph, products: Sequence[Product], parameters: Collection[torch.fx.Node],
    names: Mapping[torch.fx.Node, str],
) -> list[Layer]:
    """The layers that ``products`` belong to, in forward order.

    Backward products belong to the forward one of the same parameter: where that is used more than
    once, to the use with the same input, else to the latest use that has none yet, as backward is
    in the reverse order. Early uses may have none: of inputs that need no gradient.
    """
    learned = _learned_by(graph, parameters)
    dgrads, wgrads = ([product for product in products if product.role == role]
                      for role in ("dgrad", "wgrad"))
    forward = [(product, parameter_of(_factor(product, "w").root)) for product in products
               if product.role == "fprop"]
    found: list[Layer] = []
    for place, (fprop, weight) in reversed(list(enumerate(forward))):
        key = _matrix(fprop, "x").key
        wgrad = _take(wgrads, [each for each in wgrads if learned.get(each.node) is weight
                               and _matrix(each, "x").key == key])
        dy = None if wgrad is None else _matrix(wgrad, "dy").key
        dgrad = _take(dgrads, [each for each in dgrads
                               if parameter_of(_factor(each, "w").root) is weight
                               and dy in (None, _matrix(each, "dy").key)])
        again = sum(other is weight for _, other in forward[:place])
        name = names.get(weight, weight.name)
        found.append(Layer(f"{name}:{again}" if again else name, fprop, dgrad, wgrad))
    return found[::-1]


def _take(products: list[Product], mine: Sequence[Product]) -> Product | None:
    """The first of ``mine``, taken out of ``products``."""
    if not mine:
        return None
    products.remove(mine[0])
    return mine[0]


def _learned_by(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node]
) -> dict[torch.fx.Node, torch.fx.Node]:
    """What sums up to a parameter's gradient → the parameter. A joint graph returns what forward
    does, then a gradient for each input; one without gradients, nothing more."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if not is_tangent(node)]
    results: Any = graph.output_node().args[0]
    if not any(is_tangent(node) for node in graph.find_nodes(op="placeholder")):
        return {}
    found: dict[torch.fx.Node, torch.fx.Node] = {}
    for parameter, result in zip(inputs, results[len(results) - len(inputs):], strict=True):
        waiting = [result] if parameter in parameters else []
        while waiting:
            node = waiting.pop()
            if not isinstance(node, torch.fx.Node) or node.op != "call_function":
                continue
            found[node] = parameter
            source = source_of(node)[0]
            if node.target in (aten.add.Tensor, _COPY):
                waiting.extend(node.args[:2])
            elif source is not node:
                waiting.append(source)
    return found


def _factor(product: Product, kind: str) -> Factor:
    return product.left if product.left.kind == kind else product.right


def _matrix(product: Product, kind: str) -> Matrix:
    left, right = factor_nodes(product)
    return matrix_of(left, 1) if product.left.kind == kind else matrix_of(right, 0)


def operand_matrix(product: Product, kind: str) -> Matrix:
    """The factor of ``kind`` ``x``, ``w`` or ``dy``."""
    return _matrix(product, kind)
