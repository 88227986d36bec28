"""Fold batch norms: what follows a convolution becomes part of its weight and bias.

    γ·(W·x + b − μ)/√(σ² + ε) + β  =  (W·g)·x + (b − μ)·g + β,   g = γ/√(σ² + ε)

Cross-layer equalisation starts from it (M. Nagel et al., arXiv:1906.04721, section 3), since only
then are the ranges of a convolution's weights those that its output has.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.errors import source_line
from scaleprop.passes.transforms.base import TransformPass, Work
from scaleprop.passes.transforms.walk import substitute
from scaleprop.report.records import TransformRecord
from scaleprop.rules import contraction_of

aten: Any = torch.ops.aten

Node = torch.fx.Node

_NORM = aten._native_batch_norm_legit_no_training.default


@dataclasses.dataclass(frozen=True)
class FoldBatchNorms(TransformPass):
    """Fold batch norms into the convolutions whose output they alone read."""

    name: ClassVar[str] = "fold-batch-norms"

    def transform(self, work: Work) -> None:
        """Norm by norm, in graph order."""
        for node in list(work.rewriter.graph.nodes):
            if node.target is _NORM:
                reason = _refusal(work, node)
                absorbed = _fold(work, node) if reason is None else ()
                work.records.append(TransformRecord(
                    by=self.name, kind="affine", seed=node.name, members=int(reason is None),
                    absorbed=absorbed, refused=reason, source=source_line(node)))  # fmt: skip


def _refusal(work: Work, norm: Node) -> str | None:
    source = norm.args[0]
    contraction = contraction_of(source) if isinstance(source, Node) else None
    if contraction is None or contraction.kind not in ("linear", "conv"):
        return "it reads no convolution"
    assert isinstance(source, Node)
    if source.target is aten.convolution.default:
        return "the convolution before it is transposed"
    if len(source.users) > 1:
        return "others read the convolution before it"
    if any(item.target is not operator.getitem or item.args[1] != 0 for item in norm.users):
        return "its statistics are read"
    constants = [*source.args[1:3], *norm.args[1:5]]
    if any(value is not None and work.rewriter.constant_value(value) is None
           for value in constants):  # fmt: skip
        return "its parameters, or those of the convolution, are computed from inputs"
    return None


def _fold(work: Work, norm: Node) -> tuple[str, ...]:
    """The parameters that took it up, computed in float64 and rounded once."""
    source: Any = norm.args[0]
    given = work.rewriter.constant_value
    weight = given(source.args[1])
    gamma, beta, mean, variance = (
        None if found is None else found.double() for found in map(given, norm.args[1:5]))
    assert weight is not None and mean is not None and variance is not None
    epsilon: Any = norm.args[6]
    gain = (variance + float(epsilon)).rsqrt()
    gain = gain if gamma is None else gain * gamma
    old = given(source.args[2]) if len(source.args) > 2 else None
    bias = -mean * gain if old is None else (old.double() - mean) * gain
    bias = bias if beta is None else bias + beta
    scaled = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
    substitute(work, source, 1, scaled.to(weight.dtype), f"{norm.name} folded")
    substitute(work, source, 2, bias.to(weight.dtype), f"{norm.name} folded")
    for item in list(norm.users):
        work.rewriter.replace(item, source)
    return tuple(str(operand.target) for operand in source.args[1:3])
