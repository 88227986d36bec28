"""Streaming figures of each channel of a tensor: extremes, means and central moments."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

_CHUNK = 2**16  # elements widened to float64 at once: their powers stay in cache
# a spread below this share of the largest magnitude is rounding of float32, not spread
_CONSTANT = 2.0**-22


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """What was seen of each of K channels over ``count`` rows.

    min, max: [K] float32. mean, mean_abs: [K] float64, of x and of |x|.
    m2, m3, m4: [K] float64, Σ(x − mean)^p: central sums, so that a large mean costs no digits.
    """

    count: int
    min: torch.Tensor
    max: torch.Tensor
    mean: torch.Tensor
    mean_abs: torch.Tensor
    m2: torch.Tensor
    m3: torch.Tensor
    m4: torch.Tensor

    @property
    def amax(self) -> torch.Tensor:
        """[K], largest magnitudes."""
        return torch.maximum(self.max, -self.min)

    @property
    def variance(self) -> torch.Tensor:
        """[K], mean squared distance from the mean."""
        return self.m2 / self.count

    @property
    def norm(self) -> torch.Tensor:
        """[K], √Σx²: the channel magnitudes of arXiv:2506.01967."""
        return (self.m2 + self.count * self.mean.square()).sqrt()

    @property
    def rms(self) -> torch.Tensor:
        """[K], root of the mean square."""
        return self.norm / self.count**0.5

    @property
    def kurtosis(self) -> torch.Tensor:
        """[K], fourth central moment ÷ variance²: 3 for a Gaussian; NaN for constant channels."""
        return _kurtosis(self.count, self.m2, self.m4, self.amax.double())

    @property
    def mean_kurtosis(self) -> float:
        """Mean of the channels' kurtosis; NaN where all are constant."""
        return float(self.kurtosis.nanmean())

    @property
    def tensor_kurtosis(self) -> float:
        """Kurtosis of all elements together, exactly: channels with unlike means or spreads add."""
        gap = self.mean - self.mean.mean()
        m2 = (self.m2 + self.count * gap**2).sum()
        m4 = (self.m4 + 4 * gap * self.m3 + 6 * gap**2 * self.m2 + self.count * gap**4).sum()
        return float(_kurtosis(self.count * gap.numel(), m2, m4, self.amax.max().double()))

    @classmethod
    def of(cls, rows: torch.Tensor) -> ChannelStatistics:
        """Figures of the columns of ``rows`` [n, K] with n ≥ 1 and K ≥ 1."""
        chunks = rows.split(max(_CHUNK // rows.shape[1], 1))
        return functools.reduce(ChannelStatistics.merge, map(_of_chunk, chunks))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Figures of all rows that either has seen; associative up to rounding in float64.

        Source: Pébay, SAND2008-6212, equations 2.1 to 2.5.
        """
        a, b = self.count, other.count
        n = a + b
        gap = other.mean - self.mean
        step = gap / n
        return ChannelStatistics(
            count=n,
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
            mean=self.mean + b * step,
            mean_abs=self.mean_abs + (other.mean_abs - self.mean_abs) * (b / n),
            m2=self.m2 + other.m2 + gap * step * a * b,
            m3=self.m3 + other.m3 + gap * step**2 * a * b * (a - b)
            + 3 * step * (a * other.m2 - b * self.m2),
            m4=self.m4 + other.m4 + gap * step**3 * a * b * (a * a - a * b + b * b)
            + 6 * step**2 * (a * a * other.m2 + b * b * self.m2)
            + 4 * step * (a * other.m3 - b * self.m3),
        )


def _kurtosis(
    count: int, m2: torch.Tensor, m4: torch.Tensor, amax: torch.Tensor
) -> torch.Tensor:
    varies = (m2 / count).sqrt() > _CONSTANT * amax
    return torch.where(varies, count * m4 / m2.square(), torch.nan)


def _of_chunk(rows: torch.Tensor) -> ChannelStatistics:
    low, high = rows.amin(0), rows.amax(0)  # aminmax is many times slower along rows
    x = rows.double()
    mean, mean_abs = x.mean(0), x.abs().mean(0)
    x = x - mean
    squares = x * x
    return ChannelStatistics(
        count=rows.shape[0], min=low.float(), max=high.float(), mean=mean, mean_abs=mean_abs,
        m2=squares.sum(0), m3=(squares * x).sum(0), m4=(squares * squares).sum(0))


def relative_difficulty(norms: torch.Tensor) -> float:
    """Standard deviation ÷ mean of channel magnitudes [K]; 0 for one channel, NaN for no signal.

    The spread is the quantization difficulty of arXiv:2506.01967; uniform channels have none.
    """
    spread, mean = difficulty(norms), float(norms.double().mean())
    return 0.0 if norms.numel() < 2 else spread / mean if mean else math.nan


def difficulty(norms: torch.Tensor) -> float:
    """Standard deviation of channel magnitudes [K]; 0 for one channel."""
    return 0.0 if norms.numel() < 2 else float(norms.double().std())
