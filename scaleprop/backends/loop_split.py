"""Keeps TorchInductor from loop splits that are wrong.

Its C++ backend splits loops at the blocks of a scale, all loops of a fused group at once
(``CppScheduling.try_loop_split``). In torch 2.13 that goes wrong in three ways. Where a size is no
multiple of the block, the broken last block is not computed, and memory stays as it was. Where two
loops were written in other orders (data and its transpose, each in blocks), an assertion fails; and
where such data are square, the orders are not told apart, and each element of the one is computed
from another element of the other. The split is optional: such groups are left as they are.
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


def are_in_step(nodes: list[Any]) -> bool:
    """Whether the loops of a fused group read of each other only what the same iteration wrote.

    What is written in place has other names before and after: such groups are taken not to be.
    """
    written: dict[str, list[Any]] = {}
    for node in nodes:
        for access in node.read_writes.writes:
            written.setdefault(access.name, []).append(_place(access))
    reads = [access for node in nodes for access in node.read_writes.reads
             if access.name in written]
    return (not any(node.has_aliasing_or_mutation() for node in nodes)
            and all(_place(access) in written[access.name] for access in reads))


def _place(access: Any) -> Any:
    """Which element an iteration accesses, and of how many loops; itself where any may be."""
    return (access.index, access.size) if hasattr(access, "size") else access


def install() -> None:
    """For every compilation of this process: backward graphs may be compiled at the first step.
    Again does nothing."""
    from torch._inductor.codegen.cpp import CppScheduling  # seconds to import
    from torch.compiler import config

    split = CppScheduling.try_loop_split
    if hasattr(split, "__wrapped__"):
        return

    @functools.wraps(split)
    def checked(self: CppScheduling, nodes: list[Any]) -> list[Any]:
        if not can_split(nodes):
            return nodes
        before = [node.snapshot_loop_state() for node in nodes]
        split(self, nodes)
        if not are_in_step(nodes):
            for node, state in zip(nodes, before, strict=True):
                node.restore_loop_state(state)
        return nodes

    CppScheduling.try_loop_split = checked  # type: ignore[method-assign]
    config.cache_key_tag += "checked-loop-splits"  # wrong kernels may be cached on disk
