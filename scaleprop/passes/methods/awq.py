"""AWQ: weights that meet large activations are made larger, so that rounding costs them less.

    x·wᵀ = (x / s)·(w · s)ᵀ,   s_j = m_j^a / √(max m^a · min m^a),   m_j = mean|x_j|

(J. Lin et al., AWQ, arXiv:2306.00978, eqs. 4 and 5.) a in [0, 1] is found on a grid, one for all
operators that share the scale, by the error of what reads x, in their formats: weights alone, or
weights and activations. Each power is tried with what the weights reach, too, as SmoothQuant has
it: m_j^a / max|w_j|^(1−a). The paper measures the error behind whole blocks (attention, MLP); here
it is that of the products, so every architecture is measured alike.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.errors import CalibrationError, ConfigError, describe
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.walk import best_scale, regions

_LEAST = 1e-4  # factors below are those of channels that hardly occur


@dataclasses.dataclass(frozen=True)
class Awq(TransformPass):
    """Scale channels by a power of their mean magnitude, found by search (AWQ).

    steps: how many powers are tried, evenly spaced up to 1; each in both forms.
    What parameters cannot absorb is done at run time where the error falls (``runtime``).
    """

    steps: int = 20

    name: ClassVar[str] = "awq"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for fewer than 1 step."""
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} is a number of powers, at least 1")

    def transform(self, work: Work) -> None:
        """One power for each region."""
        for region, covered in regions(work, "scale"):
            means = {site: mean_magnitudes(work, site) for site in covered}
            importance = work.pooled(region, means).nan_to_num(0.0)
            weights = work.pooled(region, {site: work.weight_amax(site) for site in covered})
            powers = [(step + 1) / self.steps for step in range(self.steps)]
            candidates = (1 / importance_scale(importance, power, of)
                          for power in powers for of in (None, weights))  # fmt: skip
            best_scale(work, region, covered, candidates, "scaled by importance")


def mean_magnitudes(work: Work, site: Site) -> torch.Tensor:
    """[K] float64: mean|x| of each channel.

    Raises:
        CalibrationError: where calibration kept no figures per channel.
    """
    found = work.statistics(site).channel_mean_abs
    if found is None:
        raise CalibrationError(f"{describe(site.value)}: calibration kept no means per channel. "
                               "Remedy: run calibrate{channels=true} before")
    return found


def importance_scale(
    importance: torch.Tensor, power: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """s [K] of mean magnitudes [K], and of what the weights reach [K] where that counts, too; its
    largest and its least value multiply to 1."""
    scale = importance.pow(power).clamp_min(_LEAST)
    if weights is not None:
        scale = (scale / weights.clamp_min(_LEAST).pow(1 - power)).clamp_min(_LEAST)
    return scale / (scale.max() * scale.min()).sqrt()
