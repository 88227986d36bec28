"""Cross-layer equalisation: what one weight makes large the next one need not make small.

    W₂·f(W₁·x) = (W₂·s)·f((W₁/s)·x),   s_j = √(r₁_j / r₂_j)

with r₁ the largest magnitude of the weights that make channel j, r₂ of those that read it, so that
both become √(r₁·r₂) (M. Nagel et al., Data-Free Quantization, arXiv:1906.04721, eq. 11). f is
whatever lets a positive factor pass: a relu, pooling, sums of branches; so the channels of a whole
residual stream share s. A weight has a neighbour on each side, hence several rounds. Large biases
are not absorbed (their section 4.1.3): that keeps the function only nearly.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.passes.transforms.base import TransformPass, Work
from scaleprop.passes.transforms.region import Absorbed, Region
from scaleprop.passes.transforms.transform import Scale
from scaleprop.passes.transforms.walk import regions
from scaleprop.rules import contraction_of

_SETTLED = 1e-2  # of the largest change of a logarithm in a round


@dataclasses.dataclass(frozen=True)
class Equalise(TransformPass):
    """Give channels the same range in the weights before and after them (CLE).

    rounds: how often all weights are visited, at most. Needs no calibration; run fold-batch-norms
        first. Only what parameters absorb on both sides is equalised.
    """

    runtime: bool = False
    rounds: int = 8

    name: ClassVar[str] = "equalise"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for fewer than 1 round."""
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds} is a number of rounds, at least 1")

    def transform(self, work: Work) -> None:
        """Until ranges settle."""
        refused = len(work.records)
        for done in range(self.rounds):
            largest = 0.0
            for region, _ in regions(work, "scale"):
                largest = max(largest, _equalise(work, region))
            if done == 0:
                refused = sum(record.refused is not None for record in work.records)
            if largest < _SETTLED:
                break
        applied = {record.seed: record for record in work.records if record.refused is None}
        first = [record for record in work.records if record.refused is not None][:refused]
        work.records[:] = [*applied.values(), *first]  # each round visits the same


def _equalise(work: Work, region: Region) -> float:
    """The largest logarithm of a factor."""
    made, read = weight_ranges(work, region)
    usable = (made > 0) & (read > 0)
    if not region.is_free or not bool(usable.any()):
        return 0.0
    scale = region.shared(torch.where(usable, (read / made).sqrt(), 1.0))
    change = float(scale.log().abs().max())
    if change < _SETTLED or not work.apply(region, Scale(scale), "equalised"):
        return 0.0
    return change


def weight_ranges(work: Work, region: Region) -> tuple[Tensor, Tensor]:
    """[size of the region] float64 each: largest magnitudes of the weights that make each channel,
    and of those that read it; 0 where there are none."""
    found = torch.zeros(2, region.size, dtype=torch.float64)
    for item in region.absorbed:
        contraction = contraction_of(item.user)
        if contraction is None or contraction.kind not in ("linear", "conv") or item.slot != 1:
            continue
        magnitudes, codes = _magnitudes(work, item)
        for side in (0, 1):
            chosen = (codes >= 0) & (codes % 2 == side)
            found[side].scatter_reduce_(0, codes[chosen] >> 1, magnitudes[chosen], "amax")
    return region.pooled(found[0]), region.pooled(found[1])


def _magnitudes(work: Work, item: Absorbed) -> tuple[Tensor, Tensor]:
    """Flat: the largest along all other axes, and whose channel it is."""
    tensor = work.rewriter.tensor(item.operand)
    assert tensor is not None
    others = tuple(axis for axis in range(tensor.ndim) if axis not in item.layout.axes)
    largest = tensor.detach().double().abs()
    largest = largest.amax(others) if others else largest
    return largest.reshape(-1), torch.from_numpy(item.layout.codes).reshape(-1)
