"""Streaming statistics of one tensor over calibration batches, in constant memory."""

from __future__ import annotations

import dataclasses
import math

import torch

# exponents counted one by one; what is smaller or larger falls into the first or last bin
LOWEST_EXPONENT, HIGHEST_EXPONENT = -64, 63
_BINS = HIGHEST_EXPONENT - LOWEST_EXPONENT + 1


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """What calibration saw of one graph value. All figures are over every batch.

    min, max, amax: extremes, and the largest magnitude. count: elements seen; batches: how often.
    sum_of_squares: in float64; ``rms`` is its root mean.
    channel_amax: [C] float32, largest magnitude per index of the last axis; None for scalars, and
        where the last axis changed its size between batches.
    exponents: [128] int64, how many elements had ⌊log2 |x|⌋ = −64 … 63, both ends included in the
        first and last bin; zeros are counted in ``zeros``.
    second_moment: [C, C] float64, Σ xᵀx over all rows; None where it was not asked for.
    """

    min: float
    max: float
    count: int
    sum_of_squares: float
    zeros: int
    channel_amax: torch.Tensor | None
    exponents: torch.Tensor
    batches: int = 1
    second_moment: torch.Tensor | None = None

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.min), abs(self.max))

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorStatistics:
        """Statistics of one float tensor; it must be finite."""
        values = x.detach().float()
        if values.numel() == 0:
            return cls._empty(values)
        low, high = torch.aminmax(values)
        channels = values.abs().reshape(-1, values.shape[-1]).amax(0) if values.ndim else None
        mantissa_exponent = torch.frexp(values).exponent  # x = m·2^e with 0.5 ≤ |m| < 1
        is_zero = values == 0
        bins = (mantissa_exponent - 1).clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT) - LOWEST_EXPONENT
        histogram = torch.bincount(bins[~is_zero].long(), minlength=_BINS)
        return cls(
            min=float(low),
            max=float(high),
            count=values.numel(),
            sum_of_squares=float(values.double().square().sum()),
            zeros=int(is_zero.sum()),
            channel_amax=channels,
            exponents=histogram,
        )

    @classmethod
    def _empty(cls, values: torch.Tensor) -> TensorStatistics:
        channels = values.new_zeros(values.shape[-1]) if values.ndim else None
        return cls(0.0, 0.0, 0, 0.0, 0, channels, torch.zeros(_BINS, dtype=torch.int64))

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Statistics of everything that either has seen. Associative and commutative."""
        if self.count == 0 or other.count == 0:
            seen = self if other.count == 0 else other
            return dataclasses.replace(seen, batches=self.batches + other.batches)
        mine, theirs = self.channel_amax, other.channel_amax
        same = mine is not None and theirs is not None and mine.shape == theirs.shape
        moments = self.second_moment, other.second_moment
        summed = same and moments[0] is not None and moments[1] is not None
        return TensorStatistics(
            min=min(self.min, other.min),
            max=max(self.max, other.max),
            count=self.count + other.count,
            sum_of_squares=self.sum_of_squares + other.sum_of_squares,
            zeros=self.zeros + other.zeros,
            channel_amax=torch.maximum(mine, theirs) if same else None,  # type: ignore[arg-type]
            exponents=self.exponents + other.exponents,
            batches=self.batches + other.batches,
            second_moment=moments[0] + moments[1] if summed else None,  # type: ignore[operator]
        )
