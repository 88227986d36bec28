"""Casts and products of training graphs, against the formats' own rounding."""

from __future__ import annotations

import math

import pytest
import torch

from scaleprop import ops
from scaleprop.errors import FormatError
from scaleprop.formats.elements import element
from scaleprop.formats.rounding import nearest

ELEMENTS = ("e4m3", "e5m2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ELEMENTS)
def test_cast_rounds_as_the_format_says(name: str, dtype: torch.dtype):
    fmt = element(name)
    grid = torch.tensor([fmt.decode(code) for code in fmt.codes], dtype=torch.float64)
    grid = grid[grid.isfinite()].sort().values
    halves = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, halves, halves.nextafter(grid[1:]), halves.nextafter(grid[:-1]),
                   grid * 4, torch.randn(500) * fmt.max / 4]).to(dtype)
    got = ops.cast(x, name)
    assert got.dtype == fmt.storage
    assert torch.equal(got.to(torch.float64), nearest(x.to(torch.float64), fmt))


@pytest.mark.parametrize("name", ELEMENTS)
def test_cast_saturates_and_keeps_nan(name: str):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    top = element(name).max
    got = ops.cast(x, name).float().tolist()
    assert got[:2] == [top, -top] and math.isnan(got[2]) and got[3] == top


def test_cast_refuses_elements_without_a_dtype():
    with pytest.raises(FormatError, match="'e2m1' has no torch dtype"):
        ops.cast(torch.ones(3), "e2m1")


def test_gemm_is_alpha_times_the_product():
    a, b = ops.cast(torch.randn(5, 64), "e4m3"), ops.cast(torch.randn(64, 7), "e5m2")
    want = a.double() @ b.double() * 0.125
    torch.testing.assert_close(ops.gemm(a, b, 0.125, torch.float32).double(), want, rtol=1e-6,
                               atol=1e-6)
    assert ops.gemm(a, b, 1.0, torch.bfloat16).dtype == torch.bfloat16
    assert ops.gemm(a[:, :0], b[:0], 1.0, torch.float32).abs().sum() == 0


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("margin", [0, 2])
def test_power_scale_brings_amax_below_the_maximum(name: str, margin: int):
    top = element(name).max * 2.0**-margin
    for amax in (1.0, 3.14, 447.9, 448.0, 1e-30, 1e30, 2.0**-100):
        scale = float(ops.power_scale(torch.tensor([amax / 3, -amax]), name, margin))
        assert math.frexp(scale)[0] == 0.5
        assert top / 4 < amax / scale <= top or scale in (2.0**-100, 2.0**100)


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], []])
def test_power_scale_is_one_where_there_is_nothing_to_scale(values: list[float]):
    assert float(ops.power_scale(torch.tensor(values), "e4m3", 0)) == 1.0


@pytest.mark.parametrize("call", [
    lambda: torch.library.opcheck(ops.cast, (torch.randn(3, 4), "e4m3")),
    lambda: torch.library.opcheck(ops.gemm, (torch.randn(3, 4), torch.randn(4, 2), 2.0,
                                             torch.float32)),
    lambda: torch.library.opcheck(ops.power_scale, (torch.randn(3, 4), "e5m2", 1)),
])  # fmt: skip
def test_opcheck(call: object):
    call()
