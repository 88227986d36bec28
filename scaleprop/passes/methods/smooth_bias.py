"""SmoothQuant with a bias: channels move to the middle of their ranges before they are smoothed.

    x·wᵀ + b = ((x − z)/s)·(w·s)ᵀ + (b + w·z),   z_j = (max x_j + min x_j)/2
    s_j = max|x_j − z_j|^α / max|w_j|^(1−α)

(Y.-S. Tai, A.-Y. Wu, MPTQ-ViT, arXiv:2401.14895, SQ-b, after its abstract.) Of asymmetric channels
half of a range is left, so less has to move to the weights.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import Needs, TransformPass, Work
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import bounds, regions, shift_channels

_LEAST = 1e-5  # of a channel that is always 0


@dataclasses.dataclass(frozen=True)
class SmoothBias(TransformPass):
    """Shift channels to the middle of their ranges, then smooth them (MPTQ-ViT's SQ-b).

    alpha: how much of the difficulty moves to the weights, in [0, 1].
    A shift that no bias absorbs is done at run time where the error falls (``runtime``).
    """

    alpha: float = 0.5

    name: ClassVar[str] = "sq-b"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an α outside [0, 1]."""
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} must be in [0, 1]; 0.5 is usual")

    def transform(self, work: Work) -> None:
        """All shifts, then all scales."""
        shift_channels(work)
        for region, covered in regions(work, "scale"):
            low, high = bounds(work, region, covered)
            reach = torch.maximum(high.abs(), low.abs())
            weights = work.pooled(region, {site: work.weight_amax(site) for site in covered})
            factor = reach.pow(self.alpha) / weights.pow(1 - self.alpha)
            usable = factor.isfinite() & (reach > _LEAST) & (weights > _LEAST)
            factor = torch.where(usable, factor, 1.0)
            work.apply(region, Scale(region.shared(1 / factor)), "shifted and smoothed")
