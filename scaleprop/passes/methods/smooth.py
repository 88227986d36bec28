"""SmoothQuant: activations give some of their spread to the weights that they are multiplied with.

    x·wᵀ = (x / s)·(w · s)ᵀ,   s_j = max|x_j|^α / max|w_j|^(1−α)   per input channel j

(G. Xiao et al., SmoothQuant, arXiv:2211.10438, eq. 4.) α = 1 leaves all of the difficulty to the
weights, α = 0 all to the activations. Operators that read the same value share s.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import regions

_LEAST = 1e-5  # of a channel that is always 0


@dataclasses.dataclass(frozen=True)
class Smooth(TransformPass):
    """Divide activations by a factor per channel, and multiply the weights by it (SmoothQuant).

    alpha: how much of the difficulty moves to the weights, in [0, 1].
    """

    alpha: float = 0.5

    name: ClassVar[str] = "smooth"
    needs: ClassVar[Needs] = Needs(channels=True)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an α outside [0, 1]."""
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} must be in [0, 1]; 0.5 is usual")

    def transform(self, work: Work) -> None:
        """One factor per channel for each value that quantized operators read."""
        for region, covered in regions(work, "scale"):
            scale = smoothing(work, region, covered, self.alpha)
            work.apply(region, Scale(scale), "smoothed")


def smoothing(work: Work, region: Region, covered: list[Site], alpha: float) -> Tensor:
    """[size of the region] float64: 1/s, what activations are multiplied with."""
    inputs = work.pooled(region, {site: work.amax(site) for site in covered})
    weights = work.pooled(region, {site: work.weight_amax(site) for site in covered})
    factor = inputs.pow(alpha) / weights.pow(1 - alpha)
    usable = factor.isfinite() & (inputs > _LEAST) & (weights > _LEAST)
    return region.shared(1 / torch.where(usable, factor, 1.0))
