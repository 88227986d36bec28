"""FireQ: INT4 weights × FP8 activations, and keys that INT4 can hold, rotary embeddings between.

    linear     x·wᵀ = (x / s)·(w·s)ᵀ,  s_j = max|x_j|^α / max|w_j|^(1−α)
    before     q·kᵀ = (q·s)·(k / s)ᵀ,  s_j = max|k_j| / the geometric mean over the head
    after      q′·k′ᵀ = (q′·t)·(k′ / t)ᵀ,  t_j = max|k′_j| / median, of the largest few; else 1

(D. Baek et al., FireQ, arXiv:2505.20839: channel-wise scaling of linear layers, pre- and post-RoPE
scaling of attention.) FP8 takes the spread that INT4 cannot; α is searched, by the readers' error
in their formats. Scales of INT4 blocks are FP8 themselves and underflow without a scale of the
whole tensor: the recipe ``int4-fp8`` has one.

A rotary embedding turns pairs of channels, so that before it both of a pair share s_j, which the
projections of queries and keys absorb. After it every channel may have its own t_j, at run time:
two products, of queries and keys. Both help caches of keys in few bits; attention itself stays in
high precision here. The reach of keys before is that of sampled rows; after, what calibration saw,
of all heads at once, which then share s too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, ConfigError, describe, source_line
from scaleprop.passes.transforms.base import Needs, TransformPass, Work
from scaleprop.passes.transforms.heads import attending, head_regions, largest, projections
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import best_scale, regions
from scaleprop.report.records import TransformRecord
from scaleprop.rules.channels import Kind

aten: Any = torch.ops.aten

Node = torch.fx.Node

_KIND: Kind = "scale"
_LEAST = 1e-5  # of a channel that is always 0


@dataclasses.dataclass(frozen=True)
class FireQ(TransformPass):
    """Scale channels for INT4 weights and FP8 activations, and keys for caches (FireQ).

    steps: how many α are tried, evenly spaced up to 1; 0: linear layers stay.
    keys: scale keys before rotary embeddings. after: how many channels of a head after them, at
        run time.
    """

    steps: int = 10
    keys: bool = True
    after: int = 0

    name: ClassVar[str] = "fire-q"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for negative numbers."""
        if self.steps < 0 or self.after < 0:
            raise ConfigError(f"steps={self.steps} and after={self.after} are numbers of powers, "
                              "and of channels, at least 0")

    def transform(self, work: Work) -> None:
        """Attention before linears: what projections read is then still as calibration saw it."""
        for node in attending(work):
            factor = self._before(work, node) if self.keys else None
            if self.after and self.runtime:
                self._after(work, node, factor)
        for region, covered in regions(work, _KIND) if self.steps else ():
            inputs = work.pooled(region, {site: work.amax(site) for site in covered}).double()
            weights = work.pooled(region, {site: work.weight_amax(site) for site in covered})
            usable = (inputs > _LEAST) & (weights > _LEAST)
            powers = [(step + 1) / self.steps for step in range(self.steps)]
            best_scale(work, region, covered, (
                torch.where(usable, weights.pow(1 - power) / inputs.pow(power), 1.0)
                for power in powers), "smoothed")  # fmt: skip

    def _before(self, work: Work, node: Node) -> Tensor | None:
        """Scale the keys' channels inside heads; the factors [channels], where heads share them."""
        keys: Any = node.args[1]
        for region in head_regions(keys, _KIND, shared=self.after > 0):
            sources = projections(work, region, keys)
            if not region.is_free or not sources:
                continue
            reach = largest(region, {source: _reach(work, source) for source in sources})
            reach = torch.where(reach > _LEAST, reach, 1.0).log()
            heads = reach.reshape(-1, int(keys.meta["val"].shape[-1]))
            factor = region.shared((heads.mean(1, keepdim=True) - heads).exp().reshape(-1))
            return factor if work.apply(region, Scale(factor), "keys scaled") else None
        work.refuse(keys, _KIND, "no scale inside heads is free and reaches the projections")
        return None

    def _after(self, work: Work, node: Node, before: Tensor | None) -> None:
        """Multiply queries, and divide keys, of the channels that reach farthest."""
        queries, keys = node.args[:2]
        assert isinstance(queries, Node) and isinstance(keys, Node)
        seen = work.rewriter.program.statistics.get(keys.name)
        if seen is None or seen.channel_amax is None:
            raise CalibrationError(f"{describe(keys)} was not calibrated along its channels. "
                                   "Remedy: pass calibration= (example inputs)")
        reach = seen.channel_amax.double() * (1.0 if before is None else before)
        factor = torch.ones_like(reach)
        top = reach.topk(min(self.after, len(reach))).indices
        factor[top] = (reach[top] / reach.median().clamp_min(_LEAST)).clamp_min(1.0)
        why = "keys' outliers after rotary embeddings moved into queries"
        made = []
        for value, scale in ((queries, factor), (keys, 1 / factor)):
            constant = work.rewriter.constant(
                scale.to(value.meta["val"].dtype), f"{value.name}_scale", at=node, why=why)
            made.append(work.rewriter.call(aten.mul.Tensor, (value, constant), at=node, why=why))
        node.args = (*made, *node.args[2:])
        work.rewriter.modified = True
        work.records.append(TransformRecord(
            by=self.name, kind=_KIND, seed=keys.name, members=2, source=source_line(node),
            runtime=tuple(f"before {node.name!r}: {value.name} is multiplied per channel"
                          for value in (queries, keys))))  # fmt: skip


def _reach(work: Work, projection: Node) -> Tensor:
    """[outputs]: the largest magnitude that a linear makes of sampled rows of what it reads."""
    source: Any = projection.args[0]
    seen = work.rewriter.program.statistics.get(source.name)
    if seen is None or seen.sample is None:
        raise CalibrationError(f"{describe(source)}: calibration kept no rows of it. Remedy: pass "
                               "calibration= (example inputs)")
    made = seen.sample.double() @ work.weight(projection).mT
    bias = projection.args[2] if len(projection.args) > 2 else None
    value = None if bias is None else work.rewriter.constant_value(bias)
    return (made if value is None else made + value.detach().double()).abs().amax(0)
