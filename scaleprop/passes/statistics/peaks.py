"""The largest magnitudes of a graph's values, predicted from its inputs by the operators' rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.statistics.predict import predict
from scaleprop.rules.moments import Moments


def predicted_amax(
    module: torch.fx.GraphModule, inputs: Sequence[Any], chosen: Collection[torch.fx.Node]
) -> Mapping[torch.fx.Node, float]:
    """The largest magnitude of the ``chosen`` values, of those whose size the rules know.

    Only ``inputs`` are looked at; nothing is run. Of n elements |mean| + σ·√(2·ln n) is taken, what
    the largest of n independent normals is to first order. Gradients have heavier tails: exponents
    need room above it.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    found: dict[torch.fx.Node, float] = {}
    given: dict[torch.fx.Node, Moments] = {}
    with torch.no_grad(), compat.without_modes():
        for node, value in zip(placeholders, inputs, strict=True):
            if not isinstance(value, torch.Tensor):
                continue
            if (moments := Moments.measured(value)) is not None:
                given[node] = moments
            if node in chosen:
                found[node] = float(value.abs().max()) if value.numel() else 0.0
        predicted = predict(module.graph, given).moments
    for node, moments in predicted.items():
        if node in chosen:
            found.setdefault(node, _peak(moments, _count(node.meta["val"])))
    return found


def _peak(moments: Moments, count: int) -> float:
    spread = math.sqrt(moments.variance * 2 * math.log(max(count, 2)))
    return abs(moments.mean) + spread


def _count(value: torch.Tensor) -> int:
    return math.prod(compat.traced_size(size) for size in value.shape)
