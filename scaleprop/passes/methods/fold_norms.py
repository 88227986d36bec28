"""Fold norms: gains and biases of norms move into what reads them, means into what they read.

    gain    n·g → w        becomes  n → w·diag(g)                 a scale 1/g of the norm's output
    bias    n + β → w, b   becomes  n → w, b + w·β                a shift β of the norm's output
    mean    layer_norm(x)  becomes  rms_norm(x − mean(x)), and whatever writes x subtracts the mean

What is left is an RMS norm without a gain, which rotations pass (S. Ashkboos et al., SliceGPT,
arXiv:2401.15024, section 3.1; QuaRot, arXiv:2404.00456, section 4).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.passes.transforms.base import TransformPass, Work
from scaleprop.passes.transforms.region import find_region
from scaleprop.passes.transforms.transform import Centre, Scale, Shift
from scaleprop.rules.channels import Kind, sizes_of

aten: Any = torch.ops.aten

Node = torch.fx.Node

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@dataclasses.dataclass(frozen=True)
class FoldNorms(TransformPass):
    """Fold gains and biases of norms into their readers, and the means of layer norms into theirs.

    gains, biases, means: which. Only what costs nothing at run time is folded.
    """

    gains: bool = True
    biases: bool = True
    means: bool = True

    name: ClassVar[str] = "fold-norms"

    def transform(self, work: Work) -> None:
        """Norm by norm, in graph order."""
        for node in _norms(work):
            if self.gains:
                _fold_gain(work, node)
            if self.biases and node.target is aten.layer_norm.default:
                _fold_bias(work, node)
        tried: set[Node] = set()
        while self.means:
            left = [node for node in _norms(work)
                    if node.target is aten.layer_norm.default and node.args[0] not in tried]
            if not left:
                break
            source: Any = left[0].args[0]
            tried.add(source)
            _fold_mean(work, source)  # every norm that reads the same stream becomes an RMS norm


def _norms(work: Work) -> list[Node]:
    """Norms over the last axis."""
    return [node for node in work.rewriter.graph.nodes
            if node.target in _NORMS and len(node.args[1]) == 1]  # fmt: skip


def _vector(work: Work, node: Node, slot: int) -> torch.Tensor | None:
    given: Any = node.args[slot] if len(node.args) > slot else None
    value = None if given is None else work.rewriter.constant_value(given)
    return None if value is None else value.detach().double()


def _fold_gain(work: Work, node: Node) -> None:
    gain = _vector(work, node, 2)
    if gain is None:
        return
    kind: Kind = "scale" if bool((gain > 0).all()) else "sign"
    region = find_region(node, kind)
    if not region.is_free:
        work.refuse(node, kind, "; ".join(str(cut) for cut in region.cuts[:3]))
        return
    if not region.agrees(gain, 1.0):
        work.refuse(node, kind, "channels that must share a gain have different ones")
        return
    # a gain of 0 has no inverse, and needs none: what reads the channel is multiplied with 0
    forward = torch.where(gain == 0, 1.0, 1 / gain)
    if bool((gain == 0).any()) and len(region.members) > 1:
        work.refuse(node, kind, "a gain of 0 can be folded into direct readers only")
        return
    if work.apply(region, Scale(forward, gain), "gain folded"):
        _drop(node, 2)


def _fold_bias(work: Work, node: Node) -> None:
    bias = _vector(work, node, 3)
    if bias is None:
        return
    region = find_region(node, "shift")
    if not region.is_free:
        work.refuse(node, "shift", "; ".join(str(cut) for cut in region.cuts[:3]))
        return
    if not region.agrees(bias, 0.0):
        work.refuse(node, "shift", "channels that must share a bias have different ones")
    elif work.apply(region, Shift(bias), "bias folded"):
        _drop(node, 3)


def _drop(node: Node, slot: int) -> None:
    """The operand has become 1, or 0, everywhere."""
    args = list(node.args)
    args[slot] = None
    node.args = tuple(args)


def _fold_mean(work: Work, source: Node) -> None:
    region = find_region(source, "centre")
    if region.cuts:
        work.refuse(source, "centre", "; ".join(str(cut) for cut in region.cuts[:3]))
        return
    work.apply(region, Centre(sizes_of(source)[-1]), "mean folded")
