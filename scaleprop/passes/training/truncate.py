"""Emulates a narrow float everywhere: every floating value of a graph is truncated to an element.

What a machine of that format would hold, operators being exact: each value is cut to its number of
significand bits, toward zero, right after it is made; beyond the range it saturates, but Inf and
NaN stay. Views of a truncated value are not truncated again, nor is what a parameter's gradient is
written to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.passes.exponents.facts import is_float
from scaleprop.rules import rule_for

aten: Any = torch.ops.aten


def truncate_values(graph: torch.fx.Graph, element: str) -> int:
    """Truncate, in place, every value of float32 or less that an operator makes or that comes in;
    how many."""
    count = 0
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if not _holds_numbers(node):
            continue
        readers = list(node.users)
        with graph.inserting_before(first if node.op == "placeholder" else node.next), \
                compat.fake_mode_of(graph):
            made = graph.call_function(ops.truncate, (node, element))
            made.meta = {**node.meta, "val": ops.truncate(node.meta["val"], element)}
        for reader in readers:
            if not _writes(reader, node):
                reader.replace_input_with(node, made)
        count += 1
    return count


def _holds_numbers(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op not in ("placeholder", "call_function", "get_attr") or not is_float(value):
        return False
    rule = rule_for(node.target) if node.op == "call_function" else None
    return not (rule is not None and rule.moves) and not getattr(
        getattr(node.target, "_schema", None), "is_mutable", False)


def _writes(reader: torch.fx.Node, node: torch.fx.Node) -> bool:
    return reader.target is aten.copy_.default and reader.args[0] is node
