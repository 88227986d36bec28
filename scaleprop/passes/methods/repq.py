"""RepQ: channels after a norm get one range, so that one scale of the tensor serves them all.

    x'_j = (x_j − c_j) / r_j,   r_j = S_j / S̃,   c_j = min x_j + Z̃·S_j

with the width S_j of channel j's range, S̃ their mean, and the place of 0 in a range, Z_j =
−min x_j / S_j, of mean Z̃. Then every channel spans [−Z̃·S̃, (1 − Z̃)·S̃]: scales per channel have
become one scale, at no cost: the norm's weight and bias take the factors, and what reads it
(Z. Li et al., RepQ-ViT, arXiv:2212.08254, eqs. 8 to 14; RepQuant, arXiv:2402.05628). Formats
without a zero point get Z̃ = ½. Norms without a bias are only scaled, by the larger of |min| and
|max|. The paper rounds Z̃ to the grid; here calibration finds it again for the new range.

All channels are divided by the same S̃ besides, which formats undo that have scales of any value; so
it matters to scales that are powers of two only. DopQ (L. Yang et al., arXiv:2408.03291) takes that
of least mean absolute deviation from all widths, which is their median: ``common="median"``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import (
    after_norm,
    bounds,
    middle,
    regions,
    rounds_activations,
    shift_channels,
    zero_points,
)

Common = Literal["mean", "median"]


@dataclasses.dataclass(frozen=True)
class RepQ(TransformPass):
    """Give all channels after a norm the same range (RepQ-ViT).

    shift: move 0 to the same place of every range. common: what the width of all ranges becomes.
    """

    runtime: bool = False
    shift: bool = True
    common: Common = "mean"

    name: ClassVar[str] = "repq"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def transform(self, work: Work) -> None:
        """All shifts, then all scales."""
        chosen = [site for site in work.sites()
                  if after_norm(site) and rounds_activations(work, site)]  # fmt: skip
        affine = {reader for site in chosen if zero_points(work, site) for reader in site.readers}
        others = {reader for site in chosen for reader in site.readers} - affine
        if self.shift:
            shift_channels(work, aligned, lambda site: affine.issuperset(site.readers))
            shift_channels(work, middle, lambda site: others.issuperset(site.readers))

        def wanted(site: Site) -> bool:
            return (affine | others).issuperset(site.readers)

        for region, covered in regions(work, "scale", wanted):
            low, high = bounds(work, region, covered)
            free = all(zero_points(work, site) for site in covered)
            ratio = ratios(widths(low, high, free), self.common)
            work.apply(region, Scale(region.shared(1 / ratio)), "given one range")


def aligned(low: Tensor, high: Tensor) -> Tensor:
    """c [K]: what moves 0 to the mean place Z̃ of every range; a constant channel becomes 0."""
    width = high - low
    varies = width > 0
    if not bool(varies.any()):
        return low
    place = (-low[varies] / width[varies]).mean()
    return low + place.clamp(0.0, 1.0) * width


def widths(low: Tensor, high: Tensor, zero_point: bool) -> Tensor:
    """[K]: of ranges that hold 0, and are symmetric without a zero point."""
    if zero_point:
        return high.clamp_min(0.0) - low.clamp_max(0.0)
    return 2 * torch.maximum(high.abs(), low.abs())


def ratios(width: Tensor, common: Common) -> Tensor:
    """r [K]; 1 for channels that are always 0."""
    used = width > 0
    if not bool(used.any()):
        return torch.ones_like(width)
    middle = width[used].mean() if common == "mean" else width[used].quantile(0.5)
    return torch.where(used, width / middle, 1.0)
