"""Pairwise rotations: few Givens rotations and a factor per channel, learned where errors are.

    T = diag(1/s)·R₁·R₂·…·R_r      each R_i turns disjoint pairs of channels of a group:
    (a, b) → (a·cos θ − b·sin θ, a·sin θ + b·cos θ)
    x·wᵀ = (x·T)·(w·T⁻ᵀ)ᵀ,         w·T⁻ᵀ = w·diag(s)·R₁·…·R_r

(Y. Liang et al., ParoQuant, arXiv:2511.10645, section 3: s and θ minimise the quantized output's
error by Adam, from s = 1 and θ = 0; groups of 128, 8 rounds, no pair twice.) As there, pairs are
random; here by rounds of a tournament of the group's channels in random order, so that everyone
has a partner. Gradients: see ``transforms.learning``. Afterwards they train weights, and steps of
their formats; weights here are what they were, and solvers may round them later.

What parameters cannot absorb runs: s as a product; the rotations as the groups' matrices, or one
round after the other where that is faster.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.learning import QuantizedOutput, has_rows
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.transform import GivensRounds, Scale, givens_rotation

logger = logging.getLogger(__name__)

_CHECKS = 10  # on rows held out


@dataclasses.dataclass(frozen=True)
class RotatePairs(TransformPass):
    """Rotate pairs of channels and scale them, as learned on the calibration sample (ParoQuant).

    rounds: of disjoint pairs. group: channels that pairs stay within; the largest divisor of their
        number up to it. steps, rate: of Adam. rows: of the sample, in each step.
    scales: learn factors too. seed: of pairs and batches.
    """

    rounds: int = 8
    group: int = 128
    steps: int = 100
    rate: float = 0.05
    rows: int = 128
    scales: bool = True
    seed: int = 0

    name: ClassVar[str] = "rotate-pairs"
    needs: ClassVar[Needs] = Needs(channels=True, sample=512)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for numbers below 1, and for a rate that is not positive."""
        for name in ("rounds", "group", "steps", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is a number, at least 1")
        if not self.rate > 0:
            raise ConfigError(f"rate={self.rate} must be positive; 0.05 is usual")

    def transform(self, work: Work) -> None:
        """What quantized linears read, value by value."""
        generator = torch.Generator().manual_seed(self.seed)
        sites = work.sites()
        for site in sites:
            if site.axis != -1:
                work.refuse(site.value, "rotate", "a convolution sums over places, too")
                continue
            if not has_rows(work, site):
                continue
            output = QuantizedOutput(work, site)
            if output.counts:
                _Learner(work, site, sites, output, self, generator).run()


class _Learner:
    """One value's factors and angles."""

    def __init__(
        self, work: Work, site: Site, sites: list[Site], output: QuantizedOutput,
        options: RotatePairs, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.work, self.site, self.output, self.options = work, site, output, options
        self.generator = generator
        self.block = max(n for n in range(1, min(options.group, site.size) + 1)
                         if site.size % n == 0)  # fmt: skip
        self.pairs = tournament(site.size, self.block, options.rounds, generator)
        self.region = self._alone(sites) if options.scales else None
        self.angles = torch.zeros(self.pairs.shape[:2], requires_grad=True)
        self.logs = torch.zeros(site.size, requires_grad=True)

    def _alone(self, sites: list[Site]) -> Region | None:
        """Where factors may live without other sites: they would be others' factors as well."""

        def serves_this(region: Region) -> bool:
            return region.is_free and len(self.work.covered(region, sites)) == 1

        return self.work.region(self.site, "scale", allows=serves_this)

    def run(self) -> None:
        """Learn, and apply what rows held out agree to."""
        options = self.options
        given = [self.angles, self.logs] if self.region is not None else [self.angles]
        optimiser = torch.optim.Adam(given, lr=options.rate)
        before = least = self._error(self.output.held)
        best: tuple[Tensor, Tensor] | None = None
        every = max(options.steps // _CHECKS, 1)
        for step in range(1, options.steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = options.rate * (1 - (step - 1) / options.steps)
            rows = self.output.learnt
            rows = rows[torch.randperm(len(rows), generator=self.generator)[: options.rows]]
            optimiser.zero_grad()
            with torch.enable_grad():
                self._loss(rows).backward()
            optimiser.step()
            if step % every == 0 and (error := self._error(self.output.held)) < least:
                least, best = error, (self.angles.detach().clone(), self._scale().detach())
        logger.info("%s: error of rows held out %.4g, with the learned pairs %.4g",
                    self.site.value.name, before, least)  # fmt: skip
        if best is None:
            self.work.refuse(self.site.value, "rotate", "nothing learned lowers its readers' error")
            return
        self._apply(*best)

    def _scale(self) -> Tensor:
        """[K]: s, consistent where channels of the region are one."""
        if self.region is None:
            return torch.ones_like(self.logs)
        return self.region.shared(self.logs.exp()).float()

    def _loss(self, rows: Tensor) -> Tensor:
        turn, scale = GivensRounds.of(self.site.size, self.pairs, self.angles), self._scale()
        return self.output(rows, lambda x: turn(x / scale), lambda w: turn(w * scale))

    def _error(self, rows: Tensor) -> float:
        with torch.no_grad():
            return float(self._loss(rows))

    def _apply(self, angles: Tensor, scale: Tensor) -> None:
        if self.region is not None:
            factors = self.region.shared(1 / scale.double())
            self.work.apply(self.region, Scale(factors), "scaled")
        place = self.work.region(self.work.current(self.site), "rotate", block=self.block)
        if place is not None and self.pairs.numel():
            rotation = givens_rotation(self.site.size, self.pairs, angles, self.block)
            self.work.apply(place, rotation, "pairs rotated")


def tournament(size: int, block: int, rounds: int, generator: torch.Generator) -> Tensor:
    """[rounds, pairs, 2] int64: disjoint pairs within each block, none twice; fewer rounds where a
    block has no more. Who plays is drawn for each block."""
    even = block + block % 2
    count = min(rounds, even - 1)
    place = torch.arange(1, even).repeat(count, 1)
    turned = (place - 1 + torch.arange(count)[:, None]) % (even - 1) + 1
    seats = torch.cat([torch.zeros(count, 1, dtype=torch.int64), turned], 1)  # the circle method
    pairs = torch.stack([seats[:, : even // 2], seats.flip(1)[:, : even // 2]], 2)
    if even > block:  # whoever meets the seat that nobody has rests
        pairs = pairs[(pairs < block).all(2)].reshape(count, -1, 2)
    drawn = [torch.randperm(block, generator=generator) + start for start in range(0, size, block)]
    return torch.cat([order[pairs] for order in drawn], 1)
