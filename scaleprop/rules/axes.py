"""Axis maps: which axis of the input becomes which axis of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.rules.base import AxisMap


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def identity(node: torch.fx.Node) -> AxisMap:
    """Elementwise on argument 0; a broadcast axis of it is new."""
    inputs, outputs = _shape(node.args[0]), _shape(node)
    lead = len(outputs) - len(inputs)
    return tuple(
        axis - lead if axis >= lead and same_size(inputs[axis - lead], size) else None
        for axis, size in enumerate(outputs)
    )


def all_but_last(node: torch.fx.Node) -> AxisMap:
    """The last axis is contracted away."""
    return (*range(len(_shape(node)) - 1), None)


def first_only(node: torch.fx.Node) -> AxisMap:
    """Only the batch axis survives."""
    return (0, *(None for _ in _shape(node)[1:]))


def permute(node: torch.fx.Node) -> AxisMap:
    """aten.permute(x, dims)."""
    dims: Any = node.args[1]
    rank = len(_shape(node))
    return tuple(dim % rank for dim in dims)


def transpose(node: torch.fx.Node) -> AxisMap:
    """aten.transpose.int(x, dim0, dim1)."""
    rank = len(_shape(node))
    dim0, dim1 = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(rank))
    order[dim0], order[dim1] = dim1, dim0
    return tuple(order)


def unsqueeze(node: torch.fx.Node) -> AxisMap:
    """aten.unsqueeze(x, dim)."""
    rank = len(_shape(node))
    new = int(node.args[1]) % rank  # type: ignore[arg-type]
    return tuple(None if axis == new else axis - (axis > new) for axis in range(rank))


def expand(node: torch.fx.Node) -> AxisMap:
    """aten.expand(x, sizes): new leading axes, and those that were 1, are new."""
    return identity(node)


def view(node: torch.fx.Node) -> AxisMap:
    """aten.view(x, sizes): an axis survives where the sizes before it have equal products."""
    inputs, outputs = _shape(node.args[0]), _shape(node)
    return match_axes(inputs, outputs)


def match_axes(inputs: Sequence[Any], outputs: Sequence[Any]) -> AxisMap:
    """Row-major reshape: equal axes are matched from the front, then from the back."""
    result: list[int | None] = [None] * len(outputs)
    front = 0
    while front < min(len(inputs), len(outputs)) and same_size(inputs[front], outputs[front]):
        result[front] = front
        front += 1
    back = 1
    while back <= min(len(inputs), len(outputs)) - front and same_size(
        inputs[-back], outputs[-back]
    ):
        result[-back] = len(inputs) - back
        back += 1
    return tuple(result)


def same_size(left: Any, right: Any) -> bool:
    """Equal for every value of the symbols; no guard is added."""
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        return str(left) == str(right)
    return bool(left == right)
