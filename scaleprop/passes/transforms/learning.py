"""The error of quantized outputs as something to differentiate, for transforms that are learned.

    L = Σ ‖x·wᵀ − Q(T(x))·Q(T⁻ᵀ(w))ᵀ‖² / Σ ‖x·wᵀ‖²      over the readers w of a value x

Gradients pass rounding straight through (Y. Bengio et al., arXiv:1308.3432), and reach the scales,
which that alone leaves out: what shares a scale has errors in proportion to its largest value, so

    Q(x) = x + amax/amax₀·(Q(x₀) − x₀)      to first order around x₀

A transform that preserves x·wᵀ changes the error through amax alone; with the identity as gradient
descent goes nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from scaleprop.errors import CalibrationError, describe
from scaleprop.formats import ScaledFormat, fake_quantize, parse
from scaleprop.formats.grouping import Grouping
from scaleprop.passes.transforms.base import Site, Work

Move = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """weight: [N, K] float32. Formats: None where the operand stays high."""

    weight: Tensor
    activation: ScaledFormat | None
    format: ScaledFormat | None


LEAST_ROWS = 4  # of which one is held out


def has_rows(work: Work, site: Site) -> bool:
    """Whether calibration kept rows enough to learn from; recorded where it did not."""
    rows = work.statistics(site).sample
    if rows is not None and len(rows) < LEAST_ROWS:
        work.refuse(site.value, "rotate", f"calibration kept {len(rows)} rows of it, too few to "
                    "learn from")  # fmt: skip
        return False
    return True


class QuantizedOutput:
    """L of a site's linears, on rows to learn from and on rows held out.

    learnt, held: [n, K] float32, three quarters and one of what calibration kept.
    """

    def __init__(self, work: Work, site: Site) -> None:
        """Raises ``CalibrationError`` where calibration kept no rows, or too few (``has_rows``)."""
        rows = work.statistics(site).sample
        if rows is None or len(rows) < LEAST_ROWS:
            raise CalibrationError(
                f"{describe(site.value)}: calibration kept {0 if rows is None else len(rows)} rows "
                "of it, too few to learn from. Remedy: more example inputs in calibration="
            )
        cut = 3 * len(rows) // 4
        self.learnt, self.held = rows[:cut], rows[cut:]
        self._readers: list[_Reader] = []
        for node in site.readers:
            assignment, weight = work.assignment(node), work.weight(node)
            if assignment is None or weight.ndim != 2:
                continue
            if assignment.activation is None and assignment.weight is None:
                continue
            roles = assignment.activation, assignment.weight
            formats = [None if role is None else parse(role.format) for role in roles]
            self._readers.append(_Reader(weight.float(), *formats))

    @property
    def counts(self) -> bool:
        """Whether any reader is a linear with a quantized operand."""
        return bool(self._readers)

    def __call__(self, rows: Tensor, move: Move, other: Move) -> Tensor:
        """L on these rows: a scalar. move: T, of rows [n, K]; other: T⁻ᵀ, of weights [N, K]."""
        y = move(rows)
        rounded: dict[ScaledFormat | None, Tensor] = {None: y}
        noise = signal = rows.new_zeros(())
        for reader in self._readers:
            if reader.activation is not None and reader.activation not in rounded:
                rounded[reader.activation] = straight_through(y, reader.activation)
            v = other(reader.weight)
            v = v if reader.format is None else straight_through(v, reader.format)
            exact = rows @ reader.weight.T
            noise = noise + (rounded[reader.activation] @ v.T - exact).square().sum()
            signal = signal + exact.square().sum()
        return noise / signal.clamp_min(torch.finfo(torch.float32).tiny)


def straight_through(x: Tensor, fmt: ScaledFormat) -> Tensor:
    """``fake_quantize``, with gradients for x and for the largest value of what shares a scale:
    errors of rounding count as proportional to it."""
    error = fake_quantize(x.detach(), fmt) - x.detach()
    grouping = Grouping(fmt.granularity, tuple(x.shape), -1)
    reach = grouping.reduce(torch.amax, grouping.split(x).abs())
    share = reach / reach.detach().clamp_min(torch.finfo(x.dtype).tiny)
    return x + grouping.join(grouping.split(error) * share)
