"""Keeps TorchInductor from loop splits that are wrong.

Its C++ backend splits loops at the blocks of a scale, all loops of a fused group at once
(``CppScheduling.try_loop_split``). In torch 2.13 that goes wrong in two ways. Where a size is no
multiple of the block, the broken last block is not computed, and memory stays as it was. Where two
loops were written in other orders (data and its transpose, each in blocks), an assertion fails.
The split is optional: such groups are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.utils._sympy.functions import FloorDiv


def can_split(nodes: list[Any]) -> bool:
    """Whether the loops of a fused group are over the same sizes, in whole blocks."""
    found = [node.node.get_default_sizes_body() for node in nodes]
    return (all(sizes == found[0][0] for sizes, *_ in found)
            and all(_in_whole_blocks(body) for _, body, _ in found))


def _in_whole_blocks(body: Any) -> bool:
    """Whether all indices that a loop divides run over multiples of what they are divided by."""
    divisions = {division for expression in body.indexing_exprs.values()
                 for division in expression.find(FloorDiv)}
    return all(body.var_ranges[index] % divisor == 0 for index, divisor in
               (division.args for division in divisions) if index in body.var_ranges)


def install() -> None:
    """For every compilation of this process: backward graphs may be compiled at the first step.
    Again does nothing."""
    from torch._inductor.codegen.cpp import CppScheduling  # seconds to import

    split = CppScheduling.try_loop_split
    if hasattr(split, "__wrapped__"):
        return

    @functools.wraps(split)
    def checked(self: CppScheduling, nodes: list[Any]) -> list[Any]:
        return split(self, nodes) if can_split(nodes) else nodes

    CppScheduling.try_loop_split = checked  # type: ignore[method-assign]
