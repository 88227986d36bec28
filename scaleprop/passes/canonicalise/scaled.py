"""Operators of scaleprop that a model itself calls: quantized operands are passed on whole.

    scaled_mm([q[0], q[1], …], …) where q = quantize(x)  →  scaled_mm(q, …)
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx

from scaleprop.passes.canonicalise.match import is_call
from scaleprop.passes.operators import QUANTIZE, SCALED_MM
from scaleprop.passes.rewrite import Rewriter


def rewrite(rewriter: Rewriter) -> int:
    """Rewrite in place; returns how many."""
    return sum(_rewrite(rewriter, node) for node in list(rewriter.graph.nodes))


def _rewrite(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    parts: Any = node.args[0] if is_call(node, SCALED_MM) else None
    if not isinstance(parts, list) or not all(is_call(part, operator.getitem) for part in parts):
        return False
    source = parts[0].args[0]
    indices = [part.args[1] for part in parts if part.args[0] is source]
    whole = is_call(source, QUANTIZE) and len(source.meta["val"]) == len(parts)
    if not whole or indices != list(range(len(parts))):
        return False
    node.args = (source, *node.args[1:])
    rewriter.modified = True
    return True
