"""Keeps TorchInductor from a loop split that it asserts on.

It splits loops at the blocks of a scale, each loop of a fused group at the same place. Where two of
them were written in other orders (data and its transpose, each in blocks) those places differ, and
torch 2.13 stops with an AssertionError in ``try_loop_split``. The split is optional: such groups
are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any


def in_one_order(nodes: list[Any]) -> bool:
    """Whether the loops of all nodes of a fused group were written over the same sizes."""
    first, *others = [node.node.get_default_sizes_body()[0] for node in nodes]
    return all(sizes == first for sizes in others)


def install() -> None:
    """For every compilation of this process: backward graphs may be compiled at the first step.
    Again does nothing."""
    from torch._inductor.codegen.cpp import CppScheduling  # seconds to import

    split = CppScheduling.try_loop_split
    if hasattr(split, "__wrapped__"):
        return

    @functools.wraps(split)
    def checked(self: CppScheduling, nodes: list[Any]) -> list[Any]:
        return split(self, nodes) if in_one_order(nodes) else nodes

    CppScheduling.try_loop_split = checked  # type: ignore[method-assign]
