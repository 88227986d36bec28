"""Learned rotations: Q is moved along the orthogonal group until quantized outputs err least.

    L(Q) = Σ ‖x·wᵀ − Q̂(x·Q)·Q̂(w·Q)ᵀ‖² / Σ ‖x·wᵀ‖²      over sampled rows x and all readers w

(Z. Liu et al., SpinQuant, arXiv:2405.16406, eq. 2; they minimise the model's loss, for which there
are no labels here: this is each layer's own.) Gradients: see ``transforms.learning``. Cayley SGD
with momentum (J. Li et al., arXiv:2002.01113, algorithm 1), G = ∂L/∂Q:

    M ← β·M − G,   Ŵ = M·Qᵀ − ½·Q·(Qᵀ·M·Qᵀ),   W = Ŵ − Ŵᵀ,   M ← W·Q,   τ = l·√n/‖W‖
    Q ← (I − τ/2·W)⁻¹·(I + τ/2·W)·Q

Steps have a given length, l falling to 0, as losses of layers differ by orders of magnitude. In
float64, the inverse solved and not iterated for, Q stays orthogonal but for rounding; the
polar factor takes the rest away at the end. Q begins as diag(s)·H/√n; what is taken is the best of
it and of ten later ones, on rows that took no part in learning.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.passes.methods.rotate import RotateChannels
from scaleprop.passes.transforms.base import Needs, Site, Work
from scaleprop.passes.transforms.learning import QuantizedOutput, has_rows
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.transform import Rotate
from scaleprop.rules.channels import block_rows

logger = logging.getLogger(__name__)

_CHECKS = 10  # on rows held out


@dataclasses.dataclass(frozen=True)
class LearnRotation(RotateChannels):
    """Rotate as ``rotate`` does, by matrices learned on the calibration sample (SpinQuant).

    steps: of descent, each on one layer that the rotation serves. rate: of the first step, in
    radians that a channel turns; falls to 0 with the last. momentum: β, in [0, 1).
    rows: of the sample, in each step.
    """

    steps: int = 100
    rate: float = 0.03
    momentum: float = 0.9
    rows: int = 64

    name: ClassVar[str] = "learn-rotation"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for options that no descent can take."""
        super().__post_init__()
        if self.steps < 1 or self.rows < 1:
            raise ConfigError(f"steps={self.steps} and rows={self.rows} are numbers from 1")
        if not self.rate > 0 or not 0 <= self.momentum < 1:
            raise ConfigError(f"rate={self.rate} is positive, momentum={self.momentum} in [0, 1)")

    def rotation(
        self, work: Work, region: Region, sites: list[Site], generator: torch.Generator,
        online: bool = False,
    ) -> Rotate:  # fmt: skip
        """The start's matrix, moved downhill; the start where that is no better."""
        start = super().rotation(work, region, sites, generator, online)
        parts = [_Part(work, region, site) for site in sites
                 if site.axis == -1 and has_rows(work, site)]
        parts = [part for part in parts if part.output.counts]
        if not parts:
            return start
        best, before = start, _held(parts, start.matrix)
        least = before
        checked = range(self.steps - 1, -1, -max(self.steps // _CHECKS, 1))
        for step, q in enumerate(self._descend(start.matrix, parts, generator)):
            if step in checked and (error := _held(parts, q)) < least:
                best, least = Rotate(_polar(q)), error
        logger.info("%s: %d layers, error of rows held out %.4g, with the learned rotation %.4g",
                    region.seed.name, len(parts), before, least)  # fmt: skip
        return best

    def _descend(
        self, q: Tensor, parts: list[_Part], generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Q after each step."""
        momentum = torch.zeros_like(q)
        identity = torch.eye(len(q), dtype=q.dtype)
        for step in range(self.steps):
            part = parts[int(torch.randint(len(parts), (), generator=generator))]
            rows = part.output.learnt
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.rows]]
            with torch.enable_grad():
                leaf = q.float().requires_grad_()
                (gradient,) = torch.autograd.grad(part(rows, leaf), leaf)
            momentum = self.momentum * momentum - gradient.double()
            skew = momentum @ q.T - 0.5 * q @ (q.T @ momentum @ q.T)
            skew = skew - skew.T
            momentum = skew @ q
            length = float(skew.norm()) / len(q) ** 0.5  # rms turn of a channel
            if length > 0:
                half = 0.5 * self.rate * (1 - step / self.steps) / length * skew
                q = torch.linalg.solve(identity - half, q + half @ q)
            yield q


class _Part:
    """One layer that a rotation serves: which of its channels are a block's."""

    def __init__(self, work: Work, region: Region, site: Site) -> None:
        self.output = QuantizedOutput(work, site)
        layout = region.members[site.value]
        self._places = torch.from_numpy(block_rows(layout, region.block))

    def __call__(self, rows: Tensor, q: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            moved = x.clone()
            moved[:, self._places] = x[:, self._places] @ q
            return moved

        return self.output(rows, turned, turned)


def _held(parts: list[_Part], q: Tensor) -> float:
    return sum(float(part(part.output.held, q.float())) for part in parts) / len(parts)


def _polar(q: Tensor) -> Tensor:
    """The nearest orthogonal matrix."""
    left, _, right = torch.linalg.svd(q)
    return left @ right
