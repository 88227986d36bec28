"""The layers of a training step, by name: kept for pictures, as the graph itself is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
import torch.fx

from scaleprop.passes.outline import Outline, forward_outline
from scaleprop.passes.training.matrices import find_layers
from scaleprop.passes.training.roles import find_products, gradient_values


@dataclasses.dataclass(frozen=True)
class LayerSteps:
    """Where a layer is. product: its forward product. gradients: of the product's result, as the
    backward products read it; none where it has none."""

    product: str
    gradients: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StepOutline:
    """The forward part of a training step, and its layers: name → where they are."""

    forward: Outline
    layers: Mapping[str, LayerSteps]


def step_outline(
    joint: torch.fx.Graph, parameters: Collection[torch.fx.Node],
    names: Mapping[torch.fx.Node, str],
) -> StepOutline:
    """The outline of a joint graph that nothing was done to yet. names: of its inputs."""
    found = find_layers(joint, find_products(joint, parameters).found, parameters, names)
    layers = {layer.name: LayerSteps(layer.fprop.node.name, tuple(dict.fromkeys(
        factor.root.name for product in (layer.dgrad, layer.wgrad) if product is not None
        for factor in (product.left, product.right) if factor.kind == "dy"))) for layer in found}
    named = {node: names.get(node, node.name) for node in parameters}
    return StepOutline(forward_outline(joint, named, gradient_values(joint)), layers)
