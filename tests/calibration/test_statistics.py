"""Streaming statistics equal those of all data at once."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scaleprop.calibration.channels as channels_module
from scaleprop.calibration import TensorStatistics
from scaleprop.calibration.channels import ChannelStatistics
from scaleprop.calibration.sample import RowSample
from scaleprop.calibration.statistics import LOWEST_EXPONENT


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_merging_equals_all_at_once(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=generator) * 10**k for k, n in enumerate(sizes)]
    whole = TensorStatistics.of(torch.cat(parts))
    found = functools.reduce(TensorStatistics.merge, map(TensorStatistics.of, parts))
    assert (found.min, found.max, found.count, found.zeros) == (
        whole.min, whole.max, whole.count, whole.zeros)  # fmt: skip
    assert found.rms == pytest.approx(whole.rms, rel=1e-9)
    assert torch.equal(found.channel_amax, whole.channel_amax)
    assert torch.equal(found.exponents, whole.exponents)
    assert found.batches == len(parts)


def test_figures():
    x = torch.tensor([[0.0, -3.0, 0.5], [2.0, 1.0, -0.25]])
    s = TensorStatistics.of(x)
    assert (s.min, s.max, s.amax, s.count, s.zeros) == (-3.0, 2.0, 3.0, 6, 1)
    assert s.rms == pytest.approx(math.sqrt(float(x.square().mean())))
    assert s.channel_amax.tolist() == [2.0, 3.0, 0.5]
    counts = {i + LOWEST_EXPONENT: int(n) for i, n in enumerate(s.exponents) if n}
    assert counts == {-2: 1, -1: 1, 0: 1, 1: 2}


def test_exponents_are_clamped_at_both_ends():
    s = TensorStatistics.of(torch.tensor([2.0**-100, 2.0**100, 1e-45]))
    assert int(s.exponents[0]) == 2 and int(s.exponents[-1]) == 1


def test_changing_last_axis_drops_the_channels_only():
    s = TensorStatistics.of(torch.ones(2, 3)).merge(TensorStatistics.of(torch.ones(2, 4)))
    assert s.channel_amax is None and s.count == 14


def test_empty_and_scalar_tensors():
    empty = TensorStatistics.of(torch.empty(0, 3))
    assert empty.count == 0 and empty.rms == 0.0
    both = empty.merge(TensorStatistics.of(torch.full((1, 3), 5.0)))
    assert (both.min, both.max, both.count) == (5.0, 5.0, 3)
    assert TensorStatistics.of(torch.tensor(2.0)).channel_amax is None


CHANNEL_FIGURES = ("channel_amax", "channel_min", "channel_max", "channel_mean",
                   "channel_mean_abs", "kurtosis", "channel_kurtosis")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_channel_figures_are_those_of_all_rows_at_once(seed, sizes):
    """However rows are grouped, and with a mean far larger than the spread."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([0.0, 1e3, -50.0])
    parts = [torch.randn(n, 3, generator=generator) + offset for n in sizes]
    x = torch.cat(parts).double()
    of = functools.partial(TensorStatistics.of, channels=True)
    left = functools.reduce(TensorStatistics.merge, map(of, parts))
    right = functools.reduce(lambda a, b: b.merge(a), map(of, reversed(parts)))
    kurtosis = ((x - x.mean(0)) ** 4).mean(0) / x.var(0, correction=0) ** 2
    want = {
        "channel_min": x.amin(0), "channel_max": x.amax(0), "channel_amax": x.abs().amax(0),
        "channel_mean": x.mean(0), "channel_mean_abs": x.abs().mean(0),
        "kurtosis": ((x - x.mean()) ** 4).mean() / x.var(correction=0) ** 2,
        "channel_kurtosis": kurtosis.mean() if len(x) > 1 else torch.nan,
    }
    for found in (left, right):
        for name in CHANNEL_FIGURES:
            got = torch.as_tensor(getattr(found, name), dtype=torch.float64)
            expected = torch.as_tensor(want[name], dtype=torch.float64)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0, equal_nan=True, msg=name)


def test_channel_figures_in_chunks_equal_those_in_one(monkeypatch):
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) ** 3
    whole = ChannelStatistics.of(x)
    monkeypatch.setattr(channels_module, "_CHUNK", 6 * 7)
    for name, value in vars(ChannelStatistics.of(x)).items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(2)
    gauss = torch.randn(200_000, 2, generator=generator)
    flat = torch.rand(200_000, 2, generator=generator)
    assert TensorStatistics.of(gauss, channels=True).kurtosis == pytest.approx(3, abs=0.05)
    assert TensorStatistics.of(flat, channels=True).kurtosis == pytest.approx(1.8, abs=0.02)
    gauss[:, 1] *= 50  # a mixture of two widths: heavy tails together, none in either
    seen = TensorStatistics.of(gauss, channels=True)
    assert seen.kurtosis == pytest.approx(6, abs=0.1)
    assert seen.channel_kurtosis == pytest.approx(3, abs=0.05)
    constant = TensorStatistics.of(torch.full((9, 2), 0.1), channels=True)
    assert math.isnan(constant.kurtosis) and math.isnan(constant.channel_kurtosis)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_channels_lie_along_any_axis(axis):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    moved = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    seen = TensorStatistics.of(x, axis, channels=True, sample=1000)
    torch.testing.assert_close(seen.channel_amax, moved.abs().amax(0))
    torch.testing.assert_close(seen.channel_mean, moved.double().mean(0))
    assert sorted(seen.sample[:, 0].tolist()) == sorted(moved[:, 0].tolist())
    torch.testing.assert_close(seen.channel_median, moved.median(0).values)
    other = TensorStatistics.of(x, -4, channels=True, sample=5)
    assert seen.merge(other).channels is None and seen.merge(other).sample is None


def test_what_is_not_asked_for_is_not_there():
    seen = TensorStatistics.of(torch.ones(4, 3))
    assert seen.channels is None and seen.reservoir is None
    assert seen.channel_amax is not None
    assert {getattr(seen, name) for name in (*CHANNEL_FIGURES[1:], "sample", "channel_median")} \
        == {None}


def test_a_sample_is_bounded_uniform_and_the_same_in_any_order():
    parts = [torch.arange(100 * i, 100 * (i + 1)).float()[:, None].expand(-1, 4) for i in range(5)]
    generator = torch.Generator().manual_seed(4)
    samples = [RowSample.of(part, 16, generator) for part in parts]
    forward = functools.reduce(RowSample.merge, samples)
    backward = functools.reduce(RowSample.merge, samples[::-1])
    assert forward.rows.shape == (16, 4) and torch.equal(forward.rows, backward.rows)
    whole = RowSample.of(torch.cat(parts), 16, torch.Generator().manual_seed(4))
    assert torch.equal(forward.rows, whole.rows)  # batches do not matter
    counts = torch.zeros(500)
    for seed in range(400):
        drawn = RowSample.of(torch.cat(parts), 16, torch.Generator().manual_seed(seed))
        counts[drawn.rows[:, 0].long()] += 1
    expected = 400 * 16 / 500  # χ² of 499 degrees of freedom: 99.99% below 620
    assert float(((counts - expected) ** 2 / expected).sum()) < 620
    with pytest.raises(ValueError, match="rows of 4 and of 3 values"):
        forward.merge(RowSample.of(torch.ones(2, 3), 16, generator))
