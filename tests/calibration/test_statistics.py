"""Streaming statistics equal those of all data at once."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprop.calibration import TensorStatistics
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
