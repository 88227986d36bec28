"""The products of a model's linear layers, read off its joint forward and backward graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.backends.graphs import compile_joint, given_inputs
from scaleprop.passes.training.high import keep_high
from scaleprop.passes.training.matrices import operand_matrix
from scaleprop.passes.training.roles import Product, Products, find_products
from scaleprop.sweeps.overhead import Factor, Gemm


def gemms_of(
    model: torch.nn.Module, run: Callable[[torch.nn.Module], Any], rules: Collection[str] = ()
) -> tuple[Gemm, ...]:
    """The products of one training step of ``model``, as ``run`` calls it; it is compiled for that.

    rules: names for a recipe's ``high``; each product says which of them would keep it high.
    """
    found: list[Gemm] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def record(joint: torch.fx.GraphModule) -> None:
            parameters, _ = given_inputs(joint.graph, inputs)
            found.extend(_gemms(joint.graph, parameters, rules, f"{len(found)}:"))

        return compile_joint(module, inputs, record, "eager")

    compat.compile_in_place(model, backend)
    with torch.enable_grad():
        run(model)
    return tuple(found)


def _gemms(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node], rules: Collection[str],
    prefix: str,
) -> list[Gemm]:
    products = find_products(graph, parameters)
    high = {rule: _kept(graph, products, parameters, rule) for rule in rules}
    return [Gemm(product.role, *_factors(product, prefix),
                 frozenset(rule for rule, nodes in high.items() if product.node in nodes))
            for product in products.found]


def _kept(
    graph: torch.fx.Graph, products: Products, parameters: Collection[torch.fx.Node], rule: str
) -> set[torch.fx.Node]:
    low = {product.node for product in keep_high(graph, products, parameters, (rule,)).found}
    return {product.node for product in products.found} - low


def _factors(product: Product, prefix: str) -> tuple[Factor, Factor]:
    left, right = (_factor(product, side.kind, prefix) for side in (product.left, product.right))
    return left, right


def _factor(product: Product, kind: Any, prefix: str) -> Factor:
    """prefix: of the graph; values of two graphs are two values."""
    matrix = operand_matrix(product, kind)
    sizes = [compat.traced_size(size) for size in matrix.base.meta["val"].shape]
    return Factor(prefix + str(matrix.key), kind, sizes[1 - matrix.axis], sizes[matrix.axis])
