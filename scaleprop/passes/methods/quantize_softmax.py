"""Quantize softmax: attention's weights become powers of √2, or of 2, before they weigh values.

    k = ⌊−log_B p⌉,   p ≈ B^−k for k < 2^bits, else 0,   B = √2 or 2

Weights of attention crowd near 0 with few close to 1; powers of √2 are fine where they are small
and, at 2^−k/2, twice as fine near 1 as powers of 2, and are still sums and shifts on hardware
(Z. Li et al., RepQ-ViT, arXiv:2212.08254, eqs. 15 to 19, and its code: what lies below the last
power is 0). They search the largest power by percentiles, here it is 1, which bounds a softmax.
Fused attention is spelt as two products and a softmax for it. What runs are ordinary operators, an
emulation on every backend, in float: it shows what such a format costs in accuracy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from scaleprop.errors import ConfigError
from scaleprop.passes.canonicalise.attention import products_around
from scaleprop.passes.transforms.base import TransformPass, Work

aten: Any = torch.ops.aten

Node = torch.fx.Node

_FUSED = aten.scaled_dot_product_attention.default
_PER_OCTAVE = {"sqrt2": 2, "2": 1}


@dataclasses.dataclass(frozen=True)
class QuantizeSoftmax(TransformPass):
    """Round attention's weights to powers of √2 or 2 (RepQ-ViT's log√2 quantizer).

    bits: 2^bits powers from 1 downwards; less is 0. base: ``sqrt2`` or ``2``.
    Transforms of channels come before it: what it makes no longer sums to 1.
    """

    bits: int = 4
    base: Literal["sqrt2", "2"] = "sqrt2"

    name: ClassVar[str] = "quantize-softmax"
    preserves_function: ClassVar[bool] = False
    rewrites_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for bits or a base that are none."""
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} must lie in 1..8; 4 is usual")
        if str(self.base) not in _PER_OCTAVE:
            raise ConfigError(f"base={self.base!r}; known: {', '.join(_PER_OCTAVE)}")

    def transform(self, work: Work) -> None:
        """Every softmax between two products."""
        fused = [node for node in work.rewriter.graph.nodes if node.target is _FUSED]
        left = [node for node in fused if not _spell(work, node)]
        found = [node for node in work.rewriter.graph.nodes if products_around(node) is not None]
        for node in found:
            self._quantize(work, node)
        work.notes.append(f"weights of {len(found)} attentions quantized")
        work.notes += [f"{node.name} stays as it is: heads are shared inside of it"
                       for node in left]  # fmt: skip

    def _quantize(self, work: Work, softmax: Node) -> None:
        at = softmax.next
        users = [user for user in softmax.users if user.op != "output"]

        def call(op: Any, *args: Any) -> Node:
            return work.rewriter.call(op, args, at=at, why="attention's weights are quantized")

        steps = _PER_OCTAVE[str(self.base)]
        power = call(aten.round.default, call(
            aten.mul.Tensor, call(aten.log2.default, softmax), -float(steps)))  # fmt: skip
        value = call(aten.exp2.default, call(aten.mul.Tensor, power, -1.0 / steps))
        beyond = call(aten.ge.Scalar, power, 2**self.bits)
        rounded = call(aten.masked_fill.Scalar, value, beyond, 0.0)
        for user in users:
            user.replace_input_with(softmax, rounded)
        work.rewriter.modified = True


def _spell(work: Work, node: Node) -> bool:
    """Fused attention as softmax(q·kᵀ·scale + mask)·v; False where heads are shared inside."""
    given: dict[int, Any] = dict(enumerate(node.args))
    mask: Any = given.get(3, node.kwargs.get("attn_mask"))
    causal: Any = given.get(5, node.kwargs.get("is_causal", False))
    if node.kwargs.get("enable_gqa", False):
        return False
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node)

    def call(op: Any, *args: Any) -> Node:
        return work.rewriter.call(op, args, at=node, why="fused attention, spelt out")

    scale: Any = node.kwargs.get("scale")
    factor = 1.0 / math.sqrt(q.meta["val"].shape[-1]) if scale is None else scale
    rank = k.meta["val"].dim()
    turned = call(aten.permute.default, k, [*range(rank - 2), rank - 1, rank - 2])
    scores = call(aten.mul.Tensor, call(aten.matmul.default, q, turned), factor)
    if causal:
        above = call(aten.triu.default, call(aten.full_like.default, scores, -math.inf), 1)
        scores = call(aten.add.Tensor, scores, above)
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            lowest = torch.tensor(-math.inf, dtype=node.meta["val"].dtype)
            hidden = work.rewriter.constant(lowest, f"{node.name}_hidden", at=node, why="masked")
            scores = call(aten.where.self, mask, scores, hidden)
        else:
            scores = call(aten.add.Tensor, scores, mask)
    # a query that may attend to nothing gets zeros, as from the fused operator
    softmax = (call(aten._softmax.default, scores, -1, False) if mask is None else
               call(aten._safe_softmax.default, scores, -1))  # fmt: skip
    work.rewriter.replace(node, call(aten.matmul.default, softmax, v))
    return True
