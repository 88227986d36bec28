"""Moments of pointwise operators: the very operator, evaluated on the quantiles of its inputs.

No table: whatever PyTorch tags as pointwise is integrated, over one axis for each independent value
that it reads. Two arguments that are functions of the same value, such as x and sigmoid(x), share
an axis, so chains of pointwise operators keep their correlation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.fx

from scaleprop.rules.moments import Moments, grid, limit

aten: Any = torch.ops.aten

_POINTS = {1: 128, 2: 128, 3: 32}  # independent values → quantiles of each

# pointwise, though not tagged
_UNTAGGED = frozenset((
    aten._prelu_kernel.default,
    aten.hardswish.default,
    aten.leaky_relu_backward.default,
    aten.mish_backward.default,
    aten.elu_backward.default,
    aten.hardtanh_backward.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.softplus_backward.default,
))  # fmt: skip

# element for element what argument 0 is, in the same order
SAME = frozenset((
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a node's value.

    root, samples: where it is a function of one other value, element by element: which, and what
    becomes of that value's quantiles; None where it is its own root.
    """

    moments: Moments
    root: torch.fx.Node | None = None
    samples: torch.Tensor | None = None


def is_pointwise(op: Any) -> bool:
    """Whether each element of the output is a function of one element of each input."""
    return op in _UNTAGGED or (op not in SAME and torch.Tag.pointwise in getattr(op, "tags", ()))


def integrate(
    node: torch.fx.Node, known: dict[torch.fx.Node, Value]
) -> Value | None:
    """The value of a pointwise call; None where an input is unknown, or there are too many."""
    sources = [source for source in node.all_input_nodes if _is_tensor(source)]
    if any(source not in known for source in sources):
        return None
    roots = list(dict.fromkeys(known[source].root or source for source in sources))
    if len(roots) not in _POINTS:
        return _constant(node) if not roots else None
    points = _POINTS[len(roots)]
    apart = len(roots) > 2  # too many quantiles for a product: each source by its own moments
    if apart:
        roots = sources
    axes = {root: place for place, root in enumerate(roots)}
    laws = [grid(_marginal(root, known), points) for root in roots]
    sizes = [len(values) for values, _ in laws]
    given: dict[torch.fx.Node, torch.Tensor] = {}
    for source in sources:
        value = known[source]
        root = source if apart else value.root or source
        samples = value.samples if value.samples is not None and not apart else laws[axes[root]][0]
        line = samples.reshape([-1 if axis == axes[root] else 1 for axis in range(len(roots))])
        is_mask = source.meta["val"].dtype is torch.bool
        given[source] = (line != 0 if is_mask else line).expand(sizes)
    result = _call(node, given)
    if result is None:
        return None
    weight = torch.ones((), dtype=torch.float64)
    for place, (_, weights) in enumerate(laws):
        weight = weight * weights.reshape([-1 if a == place else 1 for a in range(len(roots))])
    moments = _weighted(result, weight, node)
    alone = moments is not None and len(roots) == 1
    return None if moments is None else Value(
        moments, roots[0] if alone else None, result.double() if alone else None)


def _marginal(root: torch.fx.Node, known: dict[torch.fx.Node, Value]) -> Moments:
    return known[root].moments


def _constant(node: torch.fx.Node) -> Value | None:
    """Of a call that reads numbers only."""
    result = _call(node, {})
    moments = None if result is None else Moments.measured(result)
    return None if moments is None else Value(moments)


def _call(
    node: torch.fx.Node, given: dict[torch.fx.Node, torch.Tensor]
) -> torch.Tensor | None:
    """The operator on quantiles; None where it does not take them."""
    op: Any = node.target
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: given.get(n, n))  # type: ignore[arg-type]
    options = {name: value for name, value in kwargs.items() if name != "dtype"}
    try:
        result = op(*args, **options)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return result if isinstance(result, torch.Tensor) else None


def _weighted(
    result: torch.Tensor, weight: torch.Tensor, node: torch.fx.Node
) -> Moments | None:
    """Moments of values that come with weights; +∞ and NaN, which no real input may lead to, count
    nowhere."""
    value, weight = result.double(), weight.expand(result.shape)
    hidden = value <= -_lowest(node)
    counted = value.isfinite() & ~hidden
    live, masked = float(weight[counted].sum()), float(weight[hidden].sum())
    total = live + masked
    if total <= 0:
        return None
    if live <= 1e-12 * total:
        return Moments(0.0, 0.0, masked=1.0)
    kept, weight = value[counted], weight[counted]
    return Moments(
        float((kept * weight).sum()) / live, float((kept.square() * weight).sum() / live) ** 0.5,
        zeros=float(weight[kept == 0].sum()) / total, masked=masked / total,
        nonnegative=bool((kept >= 0).all()))


def _lowest(node: torch.fx.Node) -> float:
    """How far below 0 a value stands for −∞: masks come as −∞, but for numbers among arguments."""
    most = limit(node.meta["val"].dtype)
    filled = any(isinstance(arg, int | float) and arg <= -most for arg in node.args)
    return most if filled else math.inf


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
