"""Smooth, then rotate: layer by layer whichever of the two, or both, makes quantization easier.

    x·wᵀ = (x·diag(1/s)·H)·(w·diag(s)·H)ᵀ      s_j = max|x_j|^α / max|w_j|^(1−α)

A rotation spreads a token's outlier o over all K channels, as ±o/√K each: the larger o is, the
coarser that token's grid. Smoothing first brings o down to its channel's share, and the rotation
spreads what smoothing gave to the weights (P. Czakó et al., Turning LLM Activations
Quantization-Friendly, arXiv:2506.01967, section IV; SmoothRot, arXiv:2506.05413).

What is chosen: by default what leaves the layer's output the least error, in the formats that its
operands will have. ``choose=difficulty`` goes by the paper's metric, the spread of a matrix's
channel norms; as smoothing changes the norms and moves difficulty to the weights, relative to their
mean and of both operands that are quantized, D(x) + D(w). It sees channels alone: a rotation makes
all of them equally large, and so seems to cure what it has merely spread to every one of them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scaleprop.calibration.channels import relative_difficulty
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.smooth import smoothing
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.search import OutputError
from scaleprop.passes.transforms.transform import Rotate, Scale, hadamard_rotation


@dataclasses.dataclass(frozen=True)
class SmoothRotate(TransformPass):
    """Smooth, rotate, or both, per layer whichever is best (SmoothRot).

    alpha: how much of the difficulty smoothing moves to the weights, in [0, 1].
    choose: by the output's ``error``, by ``difficulty``, or ``both`` transforms everywhere.
    margin: a transform must bring the measure below this share of what it is without, in (0, 1].
    seed: of the rotations' signs. ``runtime=false``: only rotations that parameters absorb.
    """

    alpha: float = 0.5
    choose: Literal["error", "difficulty", "both"] = "error"
    margin: float = 0.8
    seed: int = 0

    name: ClassVar[str] = "smooth-rotate"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an α or a margin out of range."""
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} must be in [0, 1]; 0.5 is usual")
        if not 0 < self.margin <= 1:
            raise ConfigError(f"margin={self.margin!r} is a share in (0, 1]; 0.8 is usual")

    def transform(self, work: Work) -> None:
        """What shares a smoothing is decided together, rotations of each value for itself."""
        generator = torch.Generator().manual_seed(self.seed)
        sites = work.sites()
        done: set[str] = set()
        for site in sites:
            if site.value.name in done:
                continue
            region = work.region(site, "scale")
            covered = [site] if region is None else work.covered(region, sites)
            done.update(member.value.name for member in covered)
            trials = [_Trial(work, member, self, generator) for member in covered]
            found = [(trial, *trial.best(None)) for trial in trials]
            if region is not None:
                scale = smoothing(work, region, covered, self.alpha)
                smoothed = [(trial, *trial.best(_of(scale, region, trial.site)))
                            for trial in trials]
                before = sum(measure for _, measure, _ in found)
                after = sum(measure for _, measure, _ in smoothed)
                if self.choose == "both" or after < self.margin * before:
                    work.apply(region, Scale(scale), "smoothed")
                    found = smoothed
            for trial, _, rotates in found:
                if rotates and trial.rotation is not None:
                    place = work.region(work.current(trial.site), "rotate")
                    if place is not None:
                        work.apply(place, trial.rotation, "rotated")


class _Trial:
    """One site, and what transforms would make of it."""

    def __init__(
        self, work: Work, site: Site, options: SmoothRotate, generator: torch.Generator
    ) -> None:
        self.site = site
        self._options = options
        self.rotation: Rotate | None = None
        if site.axis == -1:
            self.rotation = hadamard_rotation(site.size, generator)
        else:
            work.refuse(site.value, "rotate", "the readers sum over places, too")
        self._error = OutputError(work, site) if options.choose == "error" else None
        rows = work.statistics(site).sample
        assert rows is not None
        given = [item for reader in site.readers if (item := work.assignment(reader))]
        self._rows = rows.double() if any(item.activation for item in given) else None
        weights = [_by_input(work.weight(reader), site.size) for reader in site.readers]
        self._weight = torch.cat(weights) if any(item.weight for item in given) else None

    def best(self, scale: Tensor | None) -> tuple[float, bool]:
        """The measure with this scale, and whether with a rotation."""
        plain = self._measure(scale, None)
        if self.rotation is None:
            return plain, False
        turned = self._measure(scale, self.rotation)
        if self._options.choose == "both" or turned < self._options.margin * plain:
            return turned, True
        return plain, False

    def _measure(self, scale: Tensor | None, rotation: Rotate | None) -> float:
        matrix = None if rotation is None else rotation.matrix
        if self._error is not None:
            return self._error(scale=scale, rotation=matrix)
        total = 0.0
        for operand, factor in ((self._rows, scale), (self._weight, _reciprocal(scale))):
            if operand is not None:
                operand = operand if factor is None else operand * factor
                turned = operand if matrix is None else operand @ matrix
                total += relative_difficulty(turned.norm(dim=0))
        return total


def _reciprocal(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else 1 / scale


def _of(scale: Tensor, region: Region, site: Site) -> Tensor:
    """[K]: of factors of the region's channels, those of the site's."""
    codes = torch.from_numpy(region.members[site.value].codes).reshape(-1)
    found = scale[codes.clamp_min(0) >> 1]
    return torch.where(codes < 0, 1.0, torch.where(codes % 2 == 1, 1 / found, found))


def _by_input(weight: Tensor, channels: int) -> Tensor:
    """[rows, channels]: what multiplies each input channel; of a convolution in groups, each
    group's own outputs."""
    flat = weight.flatten(2).movedim(1, -1).flatten(1, -2) if weight.ndim > 2 else (
        weight.unsqueeze(1))  # fmt: skip
    groups = channels // weight.shape[1]
    split = flat.reshape(groups, -1, weight.shape[1])  # [groups, outputs·taps, inputs]
    return split.movedim(0, 1).reshape(-1, channels)
