"""Recipes whose exponents are fixed on a run's first batch: the same ones, at later steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.backends.graphs import Runner, compile_joint, given_inputs
from scaleprop.errors import ConfigError
from scaleprop.passes.training.lower import CAST, Formats, Lowered, lower_products
from scaleprop.passes.training.roles import Product, find_products


def compile_solved(
    module: torch.fx.GraphModule, given: Sequence[Any], formats: Formats, runner: Runner,
    reports: Callable[[], Sequence[Lowered]],
) -> Callable[..., Any]:
    """Compile what Dynamo captured, at the exponents of the graph in ``reports`` that it equals.

    Raises:
        RuntimeError: wrapped by ``torch.compile``, what ``transform`` raised: that there is none.
    """
    sources = [compat.source_name(node) for node in module.graph.find_nodes(op="placeholder")]

    def transform(joint: torch.fx.GraphModule) -> None:
        parameters, _ = given_inputs(joint.graph, given)
        found = reports()
        unknown = bool(found) and all(each.sizes is None for each in found)
        inputs = joint.graph.find_nodes(op="placeholder")
        layers = _layers(find_products(joint.graph, parameters).found,
                         dict(zip(inputs, sources, strict=False)))
        lower_products(joint, parameters, formats, None if unknown else (),
                       lambda _, __, chosen: _sizes_of(chosen, found))
        _rename(joint.graph, layers)

    return compile_joint(module, given, transform, runner)


def _sizes_of(
    chosen: Collection[torch.fx.Node], reports: Sequence[Lowered]
) -> Mapping[torch.fx.Node, float]:
    """What the run's own graph knew of the ``chosen`` values; graphs are told apart by names."""
    names = {node.name: node for node in chosen}
    for report in reports:
        if report.sizes is not None and set(report.sizes) <= set(names) and all(
                cast.value in names for cast in report.casts):
            return {names[name]: size for name, size in report.sizes.items()}
    raise ConfigError("the run has no graph like the one that is measured. Remedy: measure on "
                      "batches as the run has them, after its first step")


def _layers(
    products: Sequence[Product], sources: Mapping[torch.fx.Node, str]
) -> dict[str, str]:
    """Value → the weight of the first layer that reads it."""
    found: dict[str, str] = {}
    for product in products:
        pair = (product.left, product.right)
        for weight in (factor.root for factor in pair if factor.kind == "w"):
            while weight not in sources and len(weight.all_input_nodes) == 1:
                (weight,) = weight.all_input_nodes
            for factor in pair:
                found.setdefault(factor.root.name, sources.get(weight, weight.name))
    for product in products:  # wgrad reads no weight
        left, right = product.left.root.name, product.right.root.name
        for one, other in ((left, right), (right, left)):
            if other in found:
                found.setdefault(one, found[other])
    return found


def _rename(graph: torch.fx.Graph, layers: Mapping[str, str]) -> None:
    """Have casts name a layer in place of a node; a second one of its role, both."""
    taken: dict[tuple[str, str], str] = {}
    for node in graph.nodes:
        if CAST in node.meta:
            made = node.meta[CAST]
            layer = layers.get(made.value, made.value)
            if taken.setdefault((layer, made.kind), made.value) != made.value:
                layer = f"{layer}#{made.value}"
            node.meta[CAST] = dataclasses.replace(made, value=layer)
