"""Bias correction: the mean that rounded weights add to an output is taken off its bias.

    E[Q(W)·x] − E[W·x] = (Q(W) − W)·E[x],      b' = b − (Q(W) − W)·E[x]

(M. Nagel et al., Data-Free Quantization, arXiv:1906.04721, section 4.2; they find E[x] from batch
norms, here calibration saw it.) At the border of an image, where padding is read, the mean is
another one; that is left out, there as here. It moves the function as it is before rounding, and
knows how weights will be rounded: so it comes after all transforms.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, describe
from scaleprop.formats import ScaledFormat, fake_quantize, parse
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.walk import substitute

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class CorrectBias(TransformPass):
    """Take the mean error of rounded weights off the biases. Run it after all transforms.

    Weights that are rounded with compensation are left alone: how is not known beforehand.
    """

    name: ClassVar[str] = "correct-bias"
    preserves_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(channels=True)

    def transform(self, work: Work) -> None:
        """Weight by weight."""
        count = 0
        for site in work.sites():
            for reader in site.readers:
                count += _correct(work, site, reader)
        work.notes.append(f"{count} biases corrected")


def _correct(work: Work, site: Site, reader: Node) -> bool:
    assignment = work.assignment(reader)
    role = None if assignment is None else assignment.weight
    if role is None:
        return False
    if role.rounding != "nearest":
        work.notes.append(f"{reader.name}: not corrected, its weight is rounded {role.rounding}")
        return False
    old: Any = reader.args[2] if len(reader.args) > 2 else None
    bias = None if old is None else work.rewriter.constant_value(old)
    if old is not None and bias is None:
        work.notes.append(f"{reader.name}: not corrected, its bias is computed from inputs")
        return False
    mean = work.statistics(site).channel_mean
    if mean is None:
        raise CalibrationError(f"{describe(site.value)}: calibration kept no means per channel. "
                               "Remedy: run calibrate{channels=true} before")
    dtype, fmt = reader.meta["val"].dtype, parse(role.format)
    fmt = fmt.replace(rule="mse") if role.clipping == "mse" else fmt
    error = mean_error(work.weight(reader).to(dtype), mean, fmt)
    total = (-error if bias is None else bias.double() - error).to(dtype)
    substitute(work, reader, 2, total, "the weight's mean error is taken off")
    return True


def mean_error(weight: Tensor, mean: Tensor, fmt: ScaledFormat) -> Tensor:
    """(Q(W) − W)·E[x], [O] float64.

    weight: [O, K], or [O, K/groups, taps…]. mean: [K], of each input channel.
    """
    flat = weight.detach().flatten(1)
    change = fake_quantize(flat, fmt).double() - flat.double()
    outputs, inputs = weight.shape[:2]
    per_input = change.reshape(outputs, inputs, -1).sum(-1)
    groups = len(mean) // inputs
    grouped = per_input.reshape(groups, outputs // groups, inputs)
    return (grouped * mean.reshape(groups, 1, inputs)).sum(-1).reshape(-1)
