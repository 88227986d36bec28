"""Inputs of another size than a program was captured with, to check its dynamic dimensions."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.passes.base import Program


def other_size(program: Program) -> list[Any] | None:
    """The example inputs with every dynamic axis one shorter, or one longer where it was short.

    The values stay valid ones: slices and repetitions of the example. Axes of one name stay equal.
    None where no axis is dynamic.
    """
    if not any(program.dynamic_axes.values()):
        return None
    return [
        _resized(leaf, tuple(program.dynamic_axes.get(node.name, {})))
        for node, leaf in zip(program.placeholders, program.example_leaves, strict=True)
    ]


def _resized(leaf: Any, axes: tuple[int, ...]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for axis in axes:
        size = leaf.shape[axis]
        if size > 2:  # sizes of 0 and 1 are special to the tracer, and not what is checked here
            leaf = leaf.narrow(axis, 0, size - 1)
        else:
            leaf = torch.cat([leaf, leaf.narrow(axis, 0, 1)], dim=axis)
    return leaf
