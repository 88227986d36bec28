"""What is measured at one step of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperandRecord:
    """One factor x of a product, and x̂, what the product reads of it.

    layer, role: as in ``scale_report``; a value that several products read alike stands under the
        first. format: as in the recipe. amax, rms: of x, rotated where the recipe rotates.
    underflow: share of elements with x ≠ 0 and x̂ = 0. saturated: share beyond the largest value of
        the element format, at the scale they have, by more than half a step. Both in [0, 1].
    sqnr_db: 10·log10(Σx²/Σ(x-x̂)²); Inf where nothing was lost.
    bias: mean of (x̂-x)·sign(x), over the mean of |x|: below 0 where rounding shrinks.
    exponents: ⌊log₂ s⌋ → how many blocks have scale s, that of the whole tensor included; blocks
        of zeros count nowhere.
    flipped: of weights, share whose element value is another than at the measurement before.
    oscillation: of weights, Σ|Δx̂|/Σ|Δx| since then: about 1 where they travel, large where they
        swing about a boundary (arXiv:2502.20853). Both None for what is no weight, or at first;
        oscillation is also None where no weight moved.
    """

    layer: str
    role: str
    format: str
    amax: float
    rms: float
    underflow: float
    saturated: float
    sqnr_db: float
    bias: float
    exponents: Mapping[int, int]
    flipped: float | None = None
    oscillation: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRecord:
    """A parameter's gradient g̃ beside g, that of the same batch in high precision.

    cosine: ⟨g̃, g⟩/(‖g̃‖‖g‖). norm_ratio: ‖g̃‖/‖g‖. NaN where a norm that divides is 0.
    """

    parameter: str
    cosine: float
    norm_ratio: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything measured at one step, counted from 1."""

    step: int
    operands: tuple[OperandRecord, ...]
    gradients: tuple[GradientRecord, ...]
