"""Clipped weights: what one large weight costs its block is weighed against what clipping it costs.

Of each block of a row (those that share a scale) weights beyond r·max|w| are clamped to it, with
the r in [1 − shrink, 1] of least error of the block's share of the output,

    Σ_rows (x_g · (Q(clamp(w_g)) − w_g))² = d·Gram(x_g)·dᵀ,   d = Q(clamp(w_g)) − w_g

(the clipping of AWQ, J. Lin et al., arXiv:2306.00978, section 3.2 and its code). Clipped weights
compute another function, even before they are rounded: this is no transform. Run it after those.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, ConfigError, describe
from scaleprop.formats import ScaledFormat, fake_quantize, parse
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.walk import substitute

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class ClipWeights(TransformPass):
    """Clamp the largest weights of each block where the output error falls (AWQ's clipping).

    shrink: the largest share of a block's largest weight that is cut off. steps: how many are
        tried. Of linear operators only; shared weights are left alone.
    """

    shrink: float = 0.5
    steps: int = 10

    name: ClassVar[str] = "clip-weights"
    preserves_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a share outside (0, 1), or no steps."""
        if not 0 < self.shrink < 1:
            raise ConfigError(f"shrink={self.shrink} must lie between 0 and 1; 0.5 is usual")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} is a number of shares, at least 1")

    def transform(self, work: Work) -> None:
        """Weight by weight."""
        count = 0
        for site in work.sites():
            for reader in site.readers:
                assignment = work.assignment(reader)
                if assignment is None or assignment.weight is None or (
                        assignment.contraction.kind != "linear"):
                    continue
                fmt = parse(assignment.weight.format)
                if assignment.weight.clipping == "mse":
                    fmt = fmt.replace(rule="mse")
                count += self._clip(work, site, reader, fmt)
        work.notes.append(f"{count} weights clipped")

    def _clip(self, work: Work, site: Site, reader: Node, fmt: ScaledFormat) -> bool:
        source = reader.args[1]
        assert isinstance(source, Node)
        if len(source.users) > 1 or fmt.granularity.kind not in ("row", "block"):
            why = "other operators read the weight, too" if len(source.users) > 1 else (
                f"scales of {fmt} serve several rows")  # fmt: skip
            work.notes.append(f"{reader.name}: not clipped, {why}")
            return False
        rows = work.statistics(site).sample
        if rows is None or len(rows) == 0:
            raise CalibrationError(f"{describe(site.value)}: calibration kept no rows of it. "
                                   "Remedy: run calibrate{sample=256} before")
        weight = work.weight(reader).float()
        size = fmt.granularity.columns if fmt.granularity.kind == "block" else weight.shape[1]
        ratios = [1 - self.shrink * step / self.steps for step in range(1, self.steps + 1)]
        clipped = clip(weight, rows, fmt, size, ratios)
        if clipped is None:
            return False
        substitute(work, reader, 1, clipped.to(reader.meta["val"].dtype),
                   "its largest weights are clipped")
        return True


def clip(
    weight: Tensor, rows: Tensor, fmt: ScaledFormat, size: int, ratios: list[float]
) -> Tensor | None:
    """The weight [N, K] with each block of ``size`` clamped at its best ratio; None where no
    clipping lowers the error over ``rows`` [n, K]."""
    pad = -weight.shape[1] % size
    grouped_rows = torch.nn.functional.pad(rows, (0, pad)).unflatten(1, (-1, size))
    gram = torch.einsum("ngi,ngj->gij", grouped_rows, grouped_rows)
    blocks = torch.nn.functional.pad(weight, (0, pad)).unflatten(1, (-1, size))  # [N, g, size]
    largest = blocks.abs().amax(-1, keepdim=True)

    def errors(candidate: Tensor) -> Tensor:
        flat = candidate.flatten(1)[:, : weight.shape[1]]
        change = torch.nn.functional.pad(fake_quantize(flat, fmt) - weight, (0, pad))
        change = change.unflatten(1, (-1, size))
        return (torch.einsum("ngi,gij->ngj", change, gram) * change).sum(-1)

    before = errors(blocks)
    least, best = before, torch.ones_like(before)
    for ratio in ratios:
        found = errors(blocks.clamp(-largest * ratio, largest * ratio))
        best = torch.where(found < least, ratio, best)
        least = torch.minimum(found, least)
    limit = largest * best.unsqueeze(-1)
    clipped = blocks.clamp(-limit, limit)
    # a scale of the whole tensor may have moved with the largest block
    if not float(errors(clipped).sum()) < float(before.sum()):
        return None
    return clipped.flatten(1)[:, : weight.shape[1]].contiguous()
