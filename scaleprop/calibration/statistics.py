"""Streaming statistics of one tensor over calibration batches, in constant memory."""

from __future__ import annotations

import dataclasses
import math

import torch

from scaleprop.calibration.channels import ChannelStatistics
from scaleprop.calibration.sample import RowSample

# exponents counted one by one; what is smaller or larger falls into the first or last bin
LOWEST_EXPONENT, HIGHEST_EXPONENT = -64, 63
_BINS = HIGHEST_EXPONENT - LOWEST_EXPONENT + 1


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """What calibration saw of one graph value. All figures are over every batch.

    min, max, amax: extremes, and the largest magnitude. count: elements seen; batches: how often.
    sum_of_squares: in float64; ``rms`` is its root mean.
    axis: the channels' axis, counted from the end.
    channel_amax: [C] float32, largest magnitude per channel; None for scalars, and where the axis
        changed its size between batches.
    exponents: [128] int64, how many elements had ⌊log2 |x|⌋ = −64 … 63, both ends included in the
        first and last bin; zeros are counted in ``zeros``.
    second_moment: [C, C] float64, Σ xᵀx over all rows; None where it was not asked for.
    channels: more of each channel, and ``reservoir``: some rows, one value per channel each; both
        None where they were not asked for, and where channel_amax is.
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
    axis: int = -1
    channels: ChannelStatistics | None = None
    reservoir: RowSample | None = None

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.min), abs(self.max))

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0

    @property
    def channel_min(self) -> torch.Tensor | None:
        """[C] float32, smallest value per channel."""
        return None if self.channels is None else self.channels.min

    @property
    def channel_max(self) -> torch.Tensor | None:
        """[C] float32, largest value per channel."""
        return None if self.channels is None else self.channels.max

    @property
    def channel_mean(self) -> torch.Tensor | None:
        """[C] float64, mean per channel."""
        return None if self.channels is None else self.channels.mean

    @property
    def channel_mean_abs(self) -> torch.Tensor | None:
        """[C] float64, mean magnitude per channel: what AWQ (arXiv:2306.00978) calls importance."""
        return None if self.channels is None else self.channels.mean_abs

    @property
    def channel_median(self) -> torch.Tensor | None:
        """[C] float32, median per channel of the sampled rows: an estimate."""
        return None if self.sample is None else self.sample.median(0).values

    @property
    def sample(self) -> torch.Tensor | None:
        """[n, C] float32: rows drawn uniformly from all that were seen."""
        return None if self.reservoir is None else self.reservoir.rows

    @property
    def kurtosis(self) -> float | None:
        """Of all elements: fourth central moment ÷ variance²; 3 for a Gaussian."""
        return None if self.channels is None else self.channels.tensor_kurtosis

    @property
    def channel_kurtosis(self) -> float | None:
        """Mean over the channels of their kurtosis; channels that are constant are left out."""
        return None if self.channels is None else self.channels.mean_kurtosis

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        axis: int = -1,
        *,
        channels: bool = False,
        sample: int = 0,
        generator: torch.Generator | None = None,
    ) -> TensorStatistics:
        """Statistics of one float tensor; it must be finite.

        axis: the channels', counted from the end. channels: keep more than their amax.
        sample: how many rows to keep, drawn by ``generator``, on the CPU.
        """
        values = x.detach().float()
        if values.numel() == 0:
            return cls._empty(values, axis)
        low, high = torch.aminmax(values)
        magnitudes = values.abs()
        zeros = values.numel() - int(values.count_nonzero())
        others = tuple(i for i in range(values.ndim) if i != values.ndim + axis)
        has_axis = values.ndim >= -axis
        rows = None
        if has_axis and (channels or sample):
            rows = values.movedim(axis, -1).reshape(-1, values.shape[axis])
        return cls(
            min=float(low),
            max=float(high),
            count=values.numel(),
            sum_of_squares=float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2,
            zeros=zeros,
            channel_amax=_amax(magnitudes, others) if has_axis else None,
            exponents=_exponents(magnitudes, zeros),
            axis=axis,
            channels=ChannelStatistics.of(rows) if channels and rows is not None else None,
            reservoir=RowSample.of(rows, sample, generator or torch.Generator().manual_seed(0))
            if sample and rows is not None else None,
        )

    @classmethod
    def _empty(cls, values: torch.Tensor, axis: int) -> TensorStatistics:
        channels = values.new_zeros(values.shape[axis]) if values.ndim >= -axis else None
        exponents = torch.zeros(_BINS, dtype=torch.int64)
        return cls(0.0, 0.0, 0, 0.0, 0, channels, exponents, axis=axis)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Statistics of everything that either has seen. Associative and commutative: counts,
        extremes and samples exactly, sums up to rounding in float64.
        """
        if self.count == 0 or other.count == 0:
            seen = self if other.count == 0 else other
            return dataclasses.replace(seen, batches=self.batches + other.batches)
        mine, theirs = self.channel_amax, other.channel_amax
        same = (mine is not None and theirs is not None and mine.shape == theirs.shape
                and self.axis == other.axis)
        moments = self.second_moment, other.second_moment
        channels, samples = (self.channels, other.channels), (self.reservoir, other.reservoir)
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
            axis=self.axis,
            channels=channels[0].merge(channels[1])
            if same and channels[0] is not None and channels[1] is not None else None,
            reservoir=samples[0].merge(samples[1])
            if same and samples[0] is not None and samples[1] is not None else None,
        )


def _amax(magnitudes: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return magnitudes.amax(axes) if axes else magnitudes


def _exponents(magnitudes: torch.Tensor, zeros: int) -> torch.Tensor:
    """[128] int64 as ``TensorStatistics`` has them, read from the bits of float32."""
    stored = (magnitudes.view(torch.int32) >> 23).flatten()  # exponent + 127; of subnormals 0
    counts = torch.bincount(stored, minlength=256)
    counts[0] -= zeros
    first, last = LOWEST_EXPONENT + 127, HIGHEST_EXPONENT + 127
    found = counts[first:last + 1].clone()
    found[0] += counts[:first].sum()
    found[-1] += counts[last + 1:].sum()
    return found
