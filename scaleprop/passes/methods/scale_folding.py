"""Scale folding: outliers of channels move into the weights, and the norm before makes up for them.

    n·γ → w    becomes    n·(γ/s) → w·s,    s_j = (max|x_j| / g)^a

with g the geometric mean of the channels' magnitudes. It prepares weights of very few bits (A. S.
Gautam, S. Jha, RAMP, arXiv:2603.17891, "Scale Folding": per-channel scaling with compensation in
the normalization layer). The paper's abstract does not say which power a; here it is searched, by
the error of what reads the channels in their formats. Its choice of bits for each layer is not
here.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import Needs, TransformPass, Work
from scaleprop.passes.transforms.walk import after_norm, best_scale, regions


@dataclasses.dataclass(frozen=True)
class ScaleFolding(TransformPass):
    """Fold channels' magnitudes into weights and the norms before them (RAMP).

    steps: how many powers are tried, evenly spaced up to 1.
    """

    runtime: bool = False
    steps: int = 10

    name: ClassVar[str] = "scale-folding"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for fewer than 1 step."""
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} is a number of powers, at least 1")

    def transform(self, work: Work) -> None:
        """One power for each region that starts at a norm."""
        for region, covered in regions(work, "scale", after_norm):
            reach = work.pooled(region, {site: work.amax(site) for site in covered})
            used = reach > 0  # NaN, of channels that no site has, is not
            if not bool(used.any()):
                continue
            level = torch.where(used, reach / reach[used].log().mean().exp(), 1.0)
            candidates = (level.pow(-(step + 1) / self.steps) for step in range(self.steps))
            best_scale(work, region, covered, candidates, "scales folded")
