"""Convolutions: ``aten.convolution``, unless transposed, becomes ``conv1d``, ``2d`` or ``3d``."""

from __future__ import annotations

import torch.fx

from scaleprop.passes.canonicalise.match import aten, is_call, refuse, sizes
from scaleprop.passes.rewrite import Rewriter

_BY_RANK = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def rewrite(rewriter: Rewriter) -> int:
    """Rewrite in place; returns how many."""
    return sum(_rewrite(rewriter, node) for node in list(rewriter.graph.nodes))


def _rewrite(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    if not is_call(node, aten.convolution.default):
        return False
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed:
        refuse(node, "it is transposed")
        return False
    rank = len(sizes(x))
    if rank not in _BY_RANK or rank != len(sizes(weight)):
        refuse(node, "its input has no batch axis")
        return False
    args = (x, weight, bias, stride, padding, dilation, groups)
    call = rewriter.call(_BY_RANK[rank], args, at=node, why="one spelling of convolutions")
    rewriter.replace(node, call)
    return True
