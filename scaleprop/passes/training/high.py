"""Which layers a recipe keeps in high precision, told from the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.passes.statistics.structure import Structure
from scaleprop.passes.training.head import keep_head_high
from scaleprop.passes.training.matrices import find_layers
from scaleprop.passes.training.roles import (
    Product,
    Products,
    gradient_values,
    parameter_of,
    source_of,
)

aten: Any = torch.ops.aten
_CHOICES = frozenset((aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default,
                      aten.max.dim))  # fmt: skip


def keep_high(
    graph: torch.fx.Graph, products: Products, parameters: Collection[torch.fx.Node],
    rules: Sequence[str], convolutions: bool = False,
) -> Products:
    """``products`` without those that ``rules`` keep: ``head``, ``router``, ``first:n``,
    ``last:n``; see ``recipes.TrainingRecipe``. convolutions: whether branches are of these too."""
    high = dict(products.high)
    convolved = _convolutions(graph, parameters) if convolutions else {}
    attention = _batched(graph)
    branches: list[set[torch.fx.Node]] | None = None
    for rule in rules:
        kind, _, number = rule.partition(":")
        if kind == "head":
            high.update(keep_head_high(graph, products, parameters).high)
        elif kind == "router":
            high.update(_of_layers(graph, products, parameters, _routers(graph, products),
                                   "it chooses what runs"))
        else:
            if branches is None:
                branches = _branches(graph, products, parameters, convolved, attention)
            chosen = branches[:int(number)] if kind == "first" else branches[-int(number):]
            kept = set[torch.fx.Node]().union(*chosen)
            why = f"in one of the {kind} {number} branches"
            high.update(_of_layers(graph, products, parameters, kept, why))
            high.update({each: why for node in kept
                         for each in (*convolved.get(node, ()), *attention.get(node, ()))})
    return dataclasses.replace(
        products, high=high,
        found=tuple(product for product in products.found if product.node not in high))


def _of_layers(
    graph: torch.fx.Graph, products: Products, parameters: Collection[torch.fx.Node],
    forward: Collection[torch.fx.Node], why: str,
) -> dict[torch.fx.Node, str]:
    """All products of the layers whose forward product is in ``forward``."""
    found: dict[torch.fx.Node, str] = {}
    for layer in find_layers(graph, products.found, parameters, {}):
        if layer.fprop.node in forward:
            parts = (layer.fprop, layer.dgrad, layer.wgrad)
            found.update({part.node: why for part in parts if part is not None})
    return found


def _convolutions(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node]
) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Forward convolution with a parameter → itself, and those of its gradients."""
    found = {node: [node] for node in graph.find_nodes(
        op="call_function", target=aten.convolution.default)
        if parameter_of(source_of(node.args[1])[0]) in parameters}
    for back in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        for node, parts in found.items():
            if node.args[:2] == back.args[1:3]:
                parts.append(back)
    return found


def _batched(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Forward batched product → itself, and those of its gradients: what reads its factors."""
    gradients = gradient_values(graph)
    every = [node for node in graph.nodes
             if node.target in (aten.bmm.default, aten.baddbmm.default)]
    found = {node: [node] for node in every if node not in gradients}
    for back in every:
        if back in gradients:
            factor = {source_of(each)[0] for each in back.args[-2:] if each not in gradients}
            for node, parts in found.items():
                if factor & {source_of(each)[0] for each in node.args[-2:]}:
                    parts.append(back)
    return found


def _branches(
    graph: torch.fx.Graph, products: Products, parameters: Collection[torch.fx.Node],
    convolved: Collection[torch.fx.Node], attention: Collection[torch.fx.Node],
) -> list[set[torch.fx.Node]]:
    """Forward products of each residual branch, in order; of each layer where there are none."""
    products_forward = {product.node for product in products.found if product.role == "fprop"}
    forward = [node for node in graph.nodes if node in products_forward or node in convolved]
    structure = Structure(graph, parameters, gradient_values(graph))
    found: list[set[torch.fx.Node]] = []
    taken: set[torch.fx.Node] = set()
    for residual in structure.residuals():
        inside = _behind(residual.branch) - _behind(residual.skip) - taken
        taken |= inside
        found.append({node for node in (*forward, *attention) if node in inside})
    several = [branch for branch in found if not branch.isdisjoint(forward)]
    return several or [{node} for node in forward]


def _behind(node: torch.fx.Node) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _routers(graph: torch.fx.Graph, products: Products) -> set[torch.fx.Node]:
    """Forward products whose result is chosen from, with no product of a parameter between."""
    forward: dict[torch.fx.Node, Product] = {
        product.node: product for product in products.found if product.role == "fprop"}
    found: set[torch.fx.Node] = set()
    for choice in graph.nodes:
        if choice.target not in _CHOICES:
            continue
        waiting: list[Any] = [choice.args[0]]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in forward:
                found.add(node)
            else:
                waiting.extend(node.all_input_nodes)
    return found
