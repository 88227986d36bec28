"""Inputs of another size than a program was captured with, to check its dynamic dimensions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from scaleprop.passes.base import Program
from scaleprop.passes.guards import Guard

# sizes of 0 and 1 are special to the tracer, and not what is checked here
_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: size - 1 if size > 2 else size + 1,
    lambda size: size * 2,
    lambda size: size // 2 if size > 3 else size * 3,
    lambda size: size + 2,
)


def other_size(program: Program) -> list[Any] | None:
    """The example inputs with every dynamic axis one shorter, or one longer where it was short.

    Where that breaks a guard: doubled, halved or two longer; all dimensions, or one. The values
    stay valid ones: slices and repetitions of the example. Axes of one name stay equal. None where
    no axis is dynamic, and where none of these few sizes satisfies the guards: others may.
    """
    names = {name for axes in program.dynamic_axes.values() for name in axes.values()}
    guards = [Guard.parse(text) for text in program.guards]
    for wanted in (names, *({name} for name in sorted(names))):
        for change in _CHANGES:
            inputs = _changed(program, wanted, change)
            shapes = {str(node.target): leaf.shape
                      for node, leaf in zip(program.placeholders, inputs, strict=True)
                      if isinstance(leaf, torch.Tensor)}
            if wanted and all(guard.holds(shapes) for guard in guards):
                return inputs
    return None


def _changed(
    program: Program, names: Collection[str], change: Callable[[int], int]
) -> list[Any]:
    inputs: list[Any] = []
    for node, leaf in zip(program.placeholders, program.example_leaves, strict=True):
        for axis, name in program.dynamic_axes.get(node.name, {}).items():
            if name in names:
                size = leaf.shape[axis]
                leaf = leaf.index_select(axis, torch.arange(change(size)) % size)
        inputs.append(leaf)
    return inputs
