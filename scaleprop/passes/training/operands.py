"""Quantizes the factors of a training step's products, each as its recipe's operand says.

Every factor is quantized along the axis that its product sums over, once for all products that read
it so, and multiplied as it is stored: element times block scale, exact in bfloat16 or float32. The
scale of a whole tensor is multiplied into the product, where prescaling is undone too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
import torch.fx

from scaleprop.passes.training.attention import quantize_attention
from scaleprop.passes.training.convolutions import OPERATORS, quantize_convolutions
from scaleprop.passes.training.layers import StepOutline
from scaleprop.passes.training.matrices import find_layers
from scaleprop.passes.training.rewrite import Quantized, Rewrite, Settings
from scaleprop.passes.training.roles import BATCHED, CONVOLUTION, Products, is_tangent


@dataclasses.dataclass(frozen=True)
class Operands:
    """What was done to a graph; high: node → why it stays in high precision. truncated: how many
    values were, where a recipe truncates every one instead. outline: what the graph was before."""

    quantized: tuple[Quantized, ...]
    high: Mapping[str, str]
    truncated: int = 0
    outline: StepOutline | None = None


def quantize_operands(
    joint: torch.fx.GraphModule, products: Products, parameters: Collection[torch.fx.Node],
    settings: Settings, convolutions: bool = False,
) -> Operands:
    """Quantize, in place, the factors of ``products``, and of ``convolutions``."""
    work = Rewrite(joint.graph, settings)
    layers = find_layers(joint.graph, products.found, parameters, settings.names)
    layer_of = {product.node: layer for layer in layers
                for product in (layer.fprop, layer.dgrad, layer.wgrad) if product is not None}
    kept = {node for node, why in products.high.items()
            if not (convolutions and node.target in OPERATORS and why == CONVOLUTION)}
    high = {node.name: products.high[node] for node in products.high if node in kept}
    for product in products.found:  # in the graph's order: data stand before all that read them
        if product.node in layer_of:
            work.multiply(layer_of[product.node], product)
        else:
            high[product.node.name] = "its forward product was not found"
    for layer in layers:
        work.estimate(layer)
    if convolutions:
        high.update(quantize_convolutions(joint.graph, parameters, work, kept))
    lasting = {node for node in kept if products.high[node] != BATCHED}
    for node in quantize_attention(joint.graph, parameters, work, lasting):
        high.pop(node.name, None)
    work.replace()
    if any(is_tangent(node) for node in joint.graph.find_nodes(op="placeholder")):
        settings.memory.write(joint.graph, work.call)
    joint.graph.eliminate_dead_code()
    joint.graph.lint()
    joint.recompile()
    return Operands(tuple(work.quantized), high)
