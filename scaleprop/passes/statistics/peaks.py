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

    ``inputs`` are looked at, and what integers among them lead to (positions, masks) is computed;
    nothing else is run. Of n elements |mean| + σ·√(2·ln n) is taken, what the largest of n
    independent normals is to first order. Gradients have heavier tails: exponents need room above.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    known = dict(zip(placeholders, inputs, strict=True))
    with torch.no_grad(), compat.without_modes():
        given = _moments({**known, **_from_integers(module, known)})
        found = {node: float(known[node].abs().max()) for node in placeholders
                 if node in chosen and known[node].numel()}
        predicted = predict(module.graph, given).moments
    for node, moments in predicted.items():
        if node in chosen:
            found.setdefault(node, _peak(moments, _count(node.meta["val"])))
    return found


def _moments(values: Mapping[torch.fx.Node, Any]) -> dict[torch.fx.Node, Moments]:
    found = {node: Moments.measured(value) for node, value in values.items()
             if isinstance(value, torch.Tensor)
             and (value.is_floating_point() or value.dtype is torch.bool)}
    return {node: moments for node, moments in found.items() if moments is not None}


def _from_integers(
    module: torch.fx.GraphModule, known: Mapping[torch.fx.Node, Any]
) -> dict[torch.fx.Node, Any]:
    """What integers, sizes and constants alone lead to."""
    values = {node: compat.traced_size(value) if isinstance(value, torch.SymInt) else value
              for node, value in known.items()
              if not (isinstance(value, torch.Tensor) and value.is_floating_point())}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(
                value := getattr(module, str(node.target), None), torch.Tensor):
            values[node] = value
        elif node.op == "call_function" and _may_be_computed(node) and all(
                source in values for source in node.all_input_nodes):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {node: value for node, value in values.items() if node not in known}


def _may_be_computed(node: torch.fx.Node) -> bool:
    """It draws nothing and writes nothing."""
    if not isinstance(node.target, compat.OpOverload):
        return True  # sizes, and items of several results
    schema: Any = node.target._schema  # pyright: ignore[reportPrivateUsage]
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not schema.is_mutable


def _peak(moments: Moments, count: int) -> float:
    spread = math.sqrt(moments.variance * 2 * math.log(max(count, 2)))
    return abs(moments.mean) + spread


def _count(value: torch.Tensor) -> int:
    return math.prod(compat.traced_size(size) for size in value.shape)
