"""A model's last products, whose rounding nothing averages out: they stay in high precision.

Forward, what they round is in the loss itself. Backward, the loss's own gradient has few different
values: at first a probability is as good as any other, later most are close to 0 or 1. Alike values
round to the same side, and every gradient before them inherits the error: with E5M2 there, all
gradients of a small language model were found up to a tenth too long. Elsewhere a gradient is a sum
over many outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import torch
import torch.fx

from scaleprop.passes.exponents.facts import is_float
from scaleprop.passes.training.roles import (
    Product,
    Products,
    gradient_values,
    parameter_of,
    source_of,
)
from scaleprop.rules import rule_for

FORWARD = "no other product of a parameter comes between it and the loss"
BACKWARD = "a product of the loss's own gradient, whose values are alike"


def keep_head_high(
    graph: torch.fx.Graph, products: Products, parameters: Collection[torch.fx.Node]
) -> Products:
    """``products`` without those of the last layers before a loss: a result that is one number.

    Where the loss is computed outside: before a result that depends on one last product alone, if
    there are other products; a graph that has none is a piece of a model, and not its end.
    """
    gradients = gradient_values(graph)
    last = _last(graph, products.found, parameters, gradients)
    results = [node for node in graph.output_node().all_input_nodes
               if node not in gradients and is_float(node.meta.get("val"))]
    ends = _before_losses(results)
    if any(product.role == "fprop" and product not in last for product in products.found):
        ends |= _alone_before(results, parameters)
    heads = [product for product in last if product.node in ends]
    weights = {parameter_of(f.root) for head in heads for f in (head.left, head.right)
               if f.kind == "w"}
    inputs = {f.root for head in heads for f in (head.left, head.right) if f.kind == "x"}
    beyond = _beyond_a_product(graph, parameters, gradients)
    high = {head.node: FORWARD for head in heads}
    for product in products.found:
        factors = {factor.kind: factor.root for factor in (product.left, product.right)}
        if "dy" not in factors or factors["dy"] in beyond:
            continue
        if parameter_of(factors["w"]) in weights if "w" in factors else factors["x"] in inputs:
            high[product.node] = BACKWARD
    return dataclasses.replace(
        products, high={**products.high, **high},
        found=tuple(product for product in products.found if product.node not in high))


def _last(
    graph: torch.fx.Graph, found: Iterable[Product], parameters: Collection[torch.fx.Node],
    gradients: Collection[torch.fx.Node],
) -> list[Product]:
    """The forward products that no other product of a parameter depends on."""
    feeds: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        readers = [user for user in node.users if user not in gradients]
        if any(user in feeds or _multiplies(user, parameters) for user in readers):
            feeds.add(node)
    return [product for product in found
            if product.role == "fprop" and product.node not in feeds]


def _before_losses(results: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """What the results that are one number depend on."""
    found: set[torch.fx.Node] = set()
    waiting = [node for node in results if node.meta["val"].ndim == 0]
    while waiting:
        node = waiting.pop()
        waiting.extend(source for source in node.all_input_nodes if source not in found)
        found.add(node)
    return found


def _alone_before(
    results: Iterable[torch.fx.Node], parameters: Collection[torch.fx.Node]
) -> set[torch.fx.Node]:
    """The values that a result is made of, parameters apart, one after another."""
    found: set[torch.fx.Node] = set()
    for node in results:
        sources = [node]
        while len(sources) == 1:
            found.add(sources[0])
            sources = [source for source in sources[0].all_input_nodes
                       if source not in parameters and is_float(source.meta.get("val"))]
    return found


def _beyond_a_product(
    graph: torch.fx.Graph, parameters: Collection[torch.fx.Node],
    gradients: Collection[torch.fx.Node],
) -> set[torch.fx.Node]:
    """The gradients that have come through a product with a parameter."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in gradients]
        if any(source in found or _multiplies(source, parameters) for source in sources):
            found.add(node)
    return found


def _multiplies(node: torch.fx.Node, parameters: Collection[torch.fx.Node]) -> bool:
    """Whether ``node`` is a product with a parameter, or an operator that may hold one."""
    if node.op != "call_function":
        return False
    rule = rule_for(node.target)
    if rule is not None:
        multiplied = rule.contraction or rule.gradient_of
        kind = multiplied.kind if multiplied is not None else ""
        if kind == "embedding" or (not kind and rule.family != "contraction"):
            return False
    return any(parameter_of(source_of(source)[0]) in parameters for source in node.all_input_nodes)
