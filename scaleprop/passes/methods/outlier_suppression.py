"""Outlier Suppression+: channels are shifted to the middle of their ranges, then the widest shrunk.

    shift    z_j = (max x_j + min x_j)/2                 outliers of one sign become half as large
    scale    s_j = max(1, max|x_j − z_j| / t)            no channel reaches beyond t
    x·wᵀ + b = ((x − z)/s)·(w·s)ᵀ + (b + w·z)

(X. Wei et al., Outlier Suppression+, arXiv:2304.09145, eqs. 3 to 8.) One threshold t serves all
channels, found by the error of what reads them, in their formats. The paper steps evenly down to
t = 1; here thresholds are spaced evenly on a logarithm, from the largest channel's magnitude to the
smallest's, so that the grid does not depend on the unit of x. Of attention the paper measures the
error behind the softmax, here it is that of the products with weights.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import Needs, TransformPass, Work
from scaleprop.passes.transforms.walk import best_scale, bounds, regions, shift_channels

_WIDEST = 2.0**12  # between the largest and the least threshold


@dataclasses.dataclass(frozen=True)
class OutlierSuppression(TransformPass):
    """Shift channels to the middle of their ranges, then shrink the widest (OS+).

    shift, scale: which of the two. steps: how many thresholds are tried.
    What parameters cannot absorb is done at run time where the error falls (``runtime``).
    """

    shift: bool = True
    scale: bool = True
    steps: int = 32

    name: ClassVar[str] = "os-plus"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for fewer than 2 steps."""
        if self.steps < 2:
            raise ConfigError(f"steps={self.steps} is a number of thresholds, at least 2")

    def transform(self, work: Work) -> None:
        """All shifts, then all scales."""
        if self.shift:
            shift_channels(work)
        if not self.scale:
            return
        for region, covered in regions(work, "scale"):
            low, high = bounds(work, region, covered)
            reach = torch.maximum(high.abs(), low.abs())
            candidates = (1 / suppressed(reach, t) for t in thresholds(reach, self.steps))
            best_scale(work, region, covered, candidates, "outliers suppressed")


def thresholds(reach: torch.Tensor, steps: int) -> torch.Tensor:
    """[steps] float64, descending from the largest of ``reach`` [K]; empty where all are 0."""
    if not bool((reach > 0).any()):
        return reach.new_zeros(0)
    top = float(reach.max())
    least = max(float(reach[reach > 0].min()), top / _WIDEST)
    return torch.logspace(0, 1, steps, base=least / top, dtype=torch.float64) * top


def suppressed(reach: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """s [K]: what brings magnitudes ``reach`` down to ``threshold``; 1 for those below."""
    return (reach / threshold).clamp_min(1.0)
