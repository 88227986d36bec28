"""Moments themselves: of numbers, sums and mixtures, and what is masked."""

from __future__ import annotations

import math

import pytest
import torch

from scaleprop.rules.moments import Moments, Unknown, added, by_rows, limit, mixed, summed


def test_sums_mixtures_and_constants():
    assert summed(Moments(0.5, 1.0), 4) == Moments(2.0, 7.0**0.5, nonnegative=False)
    assert added(Moments(1.0, 1.0), Moments(-1.0, 1.0)).rms == 0
    half = mixed([(1, Moments(0, 2.0)), (1, Moments.constant(0.0))])
    assert half is not None and half.rms == pytest.approx(2**0.5) and half.zeros == 0.5
    assert Moments.measured(torch.empty(0)) is None
    found = by_rows(Moments(0.0, 1.0), 10**6, lambda rows: rows.mean(-1))
    assert found is not None and found.rms < 0.05


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double])
def test_what_is_masked_is_below_zero(dtype):
    lowest = torch.finfo(dtype).min
    for low in (lowest, -math.inf):
        x = torch.tensor([low, 1.0], dtype=dtype)
        assert Moments.measured(x) == Moments(1.0, 1.0, masked=0.5, nonnegative=True)
        assert Moments.constant(low, dtype) == Moments(0.0, 0.0, masked=1.0)
    high = limit(dtype)
    found = Moments.measured(torch.tensor([high, high], dtype=dtype))
    assert (found.masked, found.nonnegative) == (0.0, True)
    assert found.mean == found.rms == pytest.approx(high, rel=1e-2)
    for bad in (math.inf, math.nan):
        x = torch.tensor([bad, 3.0], dtype=dtype)
        assert Moments.measured(x) == Moments(3.0, 3.0, nonnegative=True)
        assert Moments.measured(x[:1]) is None
        with pytest.raises(Unknown):
            Moments.constant(bad, dtype)
    low = torch.tensor([-high], dtype=dtype)
    assert Moments.measured(low).masked == 1
    assert Moments.measured(low, masks=False).mean == -float(found.mean)
    assert Moments.measured(torch.tensor([-math.inf]), masks=False) is None
