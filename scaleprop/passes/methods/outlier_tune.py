"""OutlierTune: activations quantized per channel, their scales multiplied into weights beforehand.

    x_j ≈ s_j·q_j  →  Σ_j x_j·w_j = Σ_j q_j·(s_j·w_j),   s_j = max|x_j − z_j|

A scale per summed channel cannot leave the sum at run time; executed before, on the weights, it
costs nothing, and what reads x sees one scale. Symmetrization first: z_j = (max x_j + min x_j)/2
makes channels use both signs alike, so that s_j is half of a range and weights grow less (J. Wang
et al., OutlierTune, arXiv:2406.18832, after its abstract). The norm before takes 1/s and z, the
readers' biases w·z. Norms without a bias are scaled only.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import (
    bounds,
    regions,
    rounds_activations,
    shift_channels,
)


@dataclasses.dataclass(frozen=True)
class OutlierTune(TransformPass):
    """Divide quantized activations by their channels' range; weights absorb it (OutlierTune).

    symmetric: shift channels to the middle of their ranges first.
    """

    runtime: bool = False
    symmetric: bool = True

    name: ClassVar[str] = "outlier-tune"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def transform(self, work: Work) -> None:
        """All shifts, then all scales."""

        def wanted(site: Site) -> bool:
            return rounds_activations(work, site)

        if self.symmetric:
            shift_channels(work, wanted=wanted)
        for region, covered in regions(work, "scale", wanted):
            low, high = bounds(work, region, covered)
            reach = torch.maximum(high.abs(), low.abs())
            factor = torch.where(reach > 0, 1 / reach, 1.0)
            work.apply(region, Scale(region.shared(factor)), "dequantization executed before")
