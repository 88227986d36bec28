"""MergeQuant: static activations with a step per channel, at no cost at run time.

A step per input channel cannot leave the sum of a product; migrated, it need not:

    x·wᵀ ≈ (s·Q(x / s))·wᵀ = Q(x / s)·(w·s)ᵀ,   s_j = c_j·max|x_j| / q

Norms divide by s in their gains (other producers in their weights), readers multiply their weights
with it, and one static scale of the whole tensor serves every channel (J. Wang et al., MergeQuant,
arXiv:2503.07654: quantization step migration, adaptive clipping). c_j is the share of the range of
least squared error of channel j, Σ (x_j − s_j·Q(x_j / s_j))², over sampled rows and both extremes.

A weight takes all of the channels' spread up, and has to be rounded too. The authors split the
channels with the largest steps in two until their weights fit ("dimension reconstruction"); here
the number of channels stays, and the migration is partial where that is better:

    s_j ∝ (c_j·max|x_j|)^β / max|w_j|^(1 − β),   β = 1: all of it

β, or no migration, is what the readers' output error chooses; the range of the tensor's one scale
is searched for each. What they gain by adapters of low rank, solve-weights gains without any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize, parse, quantize
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.search import OutputError, site_scale
from scaleprop.passes.transforms.transform import Scale
from scaleprop.rules.channels import Kind

_LEAST = 1e-5  # of a channel that is always 0
_KIND: Kind = "scale"


@dataclasses.dataclass(frozen=True)
class MergeQuant(TransformPass):
    """Give static activations a step per channel, by moving it into weights (MergeQuant).

    clips: shares of the range to try, per channel and for the whole tensor. balance: exponents β.
    """

    clips: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    balance: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4)

    name: ClassVar[str] = "merge-quant"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for shares outside (0, 1], or exponents outside [0, 1]."""
        if not self.clips or not all(0 < clip <= 1 for clip in self.clips):
            raise ConfigError(f"clips={self.clips!r} are shares of a range, in (0, 1]")
        if not all(0 <= power <= 1 for power in self.balance):
            raise ConfigError(f"balance={self.balance!r} are exponents in [0, 1]; 1 is usual")

    def transform(self, work: Work) -> None:
        """Every value that only static readers read, region by region."""
        sites = [site for site in work.sites() if _is_static(work, site)]
        if not sites:
            work.notes.append("no activation is static: nothing to migrate")
        done: set[str] = set()
        for site in sites:
            if site.value.name in done:
                continue
            region = work.region(site, _KIND)
            members = [site] if region is None else work.covered(region, sites)
            done.update(member.value.name for member in members)
            self._migrate(work, region, [_Read(work, member, self.clips) for member in members])

    def _migrate(self, work: Work, region: Region | None, reads: Sequence[_Read]) -> None:
        """The best of all candidates, no migration among them."""
        candidates: list[Tensor | None] = [None]
        if region is not None:
            reach = work.pooled(region, {read.site: read.reach for read in reads})
            weights = work.pooled(region, {read.site: work.weight_amax(read.site)
                                           for read in reads})  # fmt: skip
            usable = (reach > _LEAST) & (weights > _LEAST)  # of channels of no site: NaN
            for power in self.balance:
                step = torch.where(usable, reach.pow(power) / weights.pow(1 - power), 1.0)
                candidates.append(region.shared(1 / step))
        best: tuple[float, Tensor | None, list[tuple[float, float]]] | None = None
        for factor in candidates:
            found = [read.measured(region, factor, self.clips) for read in reads]
            error = sum(item[0] for item in found) / len(found)
            if best is None or error < best[0]:
                best = error, factor, [item[1] for item in found]
        assert best is not None
        if region is not None and best[1] is not None and not work.apply(
            region, Scale(best[1]), "quantization steps migrated"
        ):
            return
        for read, extremes in zip(reads, best[2], strict=True):
            for reader in read.site.readers:
                work.assign(reader, extremes=extremes)


def _is_static(work: Work, site: Site) -> bool:
    found = [work.assignment(reader) for reader in site.readers]
    return all(item is not None and item.activation is not None
               and item.activation.scaling == "static" for item in found)


class _Read:
    """A site, its rows and what they reach in each channel, clipped.

    low, high, reach: [K] float64; reach is the larger magnitude. energy: [K], Σ w² of the readers.
    """

    def __init__(self, work: Work, site: Site, clips: Sequence[float]) -> None:
        self.site = site
        seen = work.statistics(site)
        self.error = OutputError(work, site)
        assert seen.sample is not None and seen.channel_min is not None
        assert seen.channel_max is not None
        low, high = seen.channel_min.double(), seen.channel_max.double()
        self.whole = low.min().item(), high.max().item()
        self.rows = torch.cat([seen.sample.double(), low[None], high[None]])
        role = work.assignment(site.readers[0])
        assert role is not None and role.activation is not None
        self.format = parse(role.activation.format)
        self.energy = torch.stack([_energy(work.weight(reader), site.size)
                                   for reader in site.readers]).sum(0)  # fmt: skip
        share = self._clipped(torch.maximum(-low, high), clips)
        self.low, self.high = low * share, high * share
        self.reach = torch.maximum(-self.low, self.high)

    def _clipped(self, amax: Tensor, clips: Sequence[float]) -> Tensor:
        """[K]: the share of each channel's range that rounds its rows best."""
        errors = []
        for clip in clips:
            unit = (amax * clip).clamp_min(_LEAST)
            rows = self.rows / unit
            ends = rows.min().item() * clip, rows.max().item() * clip  # of what is not clipped
            errors.append(self._noise(rows, ends) * unit.square())
        return torch.tensor(clips, dtype=torch.float64)[torch.stack(errors).argmin(0)]

    def _noise(self, rows: Tensor, ends: tuple[float, float]) -> Tensor:
        """[K]: Σ (y − Q(y))² with one static scale for what lies between ``ends``."""
        _, *scales = quantize(torch.tensor(ends, dtype=torch.float32), self.format).parts
        return (fake_quantize(rows, self.format, scales=scales) - rows).square().sum(0)

    def measured(
        self, region: Region | None, factor: Tensor | None, clips: Sequence[float]
    ) -> tuple[float, tuple[float, float]]:
        """The readers' error with the site's value times ``factor``, and the range for that."""
        scale, (low, high) = torch.ones_like(self.reach), self.whole
        if region is not None and factor is not None:
            scale = site_scale(factor, region, self.site)
            low, high = (self.low * scale).min().item(), (self.high * scale).max().item()
        rows, energy = self.rows * scale, self.energy / scale.square()
        ranges = [(low * clip, high * clip) for clip in clips]
        noise = torch.stack([(self._noise(rows, ends) * energy).sum() for ends in ranges])
        extremes = ranges[int(noise.argmin())]
        return self.error(scale=scale, extremes=extremes), extremes


def _energy(weight: Tensor, channels: int) -> Tensor:
    """[K]: Σ w² per input channel; of a convolution in groups, each group's own outputs."""
    squares = weight.square().flatten(2).sum(-1) if weight.ndim > 2 else weight.square()
    groups = channels // weight.shape[1]
    return squares.reshape(groups, -1, weight.shape[1]).sum(1).reshape(-1)
