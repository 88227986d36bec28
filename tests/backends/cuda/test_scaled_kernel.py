"""Products of MX blocks as units with block scales take them, and where these are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaleprop.backends.cuda import library, operators, products, scaled
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from tests.backends.cuda.test_product_kernels import assert_near, operands
from tests.backends.cuda.test_quantize_kernels import DEVICE

# the interpreter has no subnormals of E5M2; numbers of a normal distribution take none
NAMES = ("mxfp4", "mxfp8", "mxfp8_e5m2")
PAIRS = [(x, w) for x in NAMES for w in NAMES]
MIXED = ("mxfp8", "mxfp4")


def parts_of(x: Tensor, w: Tensor, names: tuple[str, str]) -> tuple[list[Tensor], list[Tensor]]:
    left, right = (quantize_parts(each, parse(name))
                   for each, name in zip((x, w), names, strict=True))  # fmt: skip
    return left, right


def exact(parts: list[Tensor], name: str, shape: torch.Size) -> Tensor:
    return dequantize_parts(parts, parse(name), shape, dtype=torch.float64)


@pytest.mark.parametrize(("sizes", "tiled"), [
    ((1, 48, 32), False), ((5, 70, 96), False), ((33, 48, 200), False), ((66, 70, 200), False),
    ((130, 48, 200), True), ((66, 140, 300), True)])  # fmt: skip
@pytest.mark.parametrize("names", PAIRS, ids=" ".join)
def test_as_near_as_sums_of_float32(names, sizes, tiled):
    x, w, bias = operands(*sizes)
    x[0, :32] = w[-1, -8:] = w[3] = 0.0
    left, right = parts_of(x, w, names)
    got = scaled.multiply(left, right, bias, *map(parse, names), sizes[2], tiled=tiled)
    assert_near(got, exact(left, names[0], x.shape), exact(right, names[1], w.shape), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 66])
def test_results_in_other_dtypes(m, dtype):
    x, w, bias = operands(m, 20, 96)
    left, right = parts_of(x / x.abs().amax(1, keepdim=True), w, MIXED)
    got = scaled.multiply(left, right, bias, *map(parse, MIXED), 96, dtype)
    assert got.dtype == dtype
    assert_near(got, exact(left, MIXED[0], x.shape), exact(right, MIXED[1], w.shape), bias)


@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), MIXED])
def test_ranges_of_k_add_up(names):
    x, w, bias = operands(3, 20, 700)
    left, right = parts_of(x, w, names)
    got = scaled.multiply(left, right, bias, *map(parse, names), 700, splits=3)
    assert_near(got, exact(left, names[0], x.shape), exact(right, names[1], w.shape), bias)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), MIXED])
@pytest.mark.parametrize(("m", "tiled"), [(4, False), (70, False), (70, True)])
def test_a_scale_of_nan_is_its_row_alone(m, tiled, names):
    x, w, _ = operands(m, 40, 96)
    x[2, 40], w[7, 95] = torch.nan, torch.nan
    w[:, 32:64] = 0.0  # 0 times it
    left, right = parts_of(x, w, names)
    assert (left[1].view(torch.uint8)[2] == 255).sum() == 1
    got = scaled.multiply(left, right, None, *map(parse, names), 96, tiled=tiled)
    want = exact(left, names[0], x.shape) @ exact(right, names[1], w.shape).t()
    assert torch.equal(got.isnan(), want.isnan())
    assert got[2].isnan().all() and got[:, 7].isnan().all() and got.isnan().sum() == m + 40 - 1


@pytest.mark.parametrize("code", [0, 240])
def test_scales_at_the_ends(code):
    fmt = parse("mxfp4")
    ones = torch.full((2, 16), 0x22, dtype=torch.uint8, device=DEVICE)  # 1.0 is code 2
    scales = torch.tensor([[127], [code]], dtype=torch.uint8, device=DEVICE)
    got = scaled.multiply([ones, scales], [ones[:1], scales[:1]], None, fmt, fmt, 32)
    assert got.flatten().tolist() == [32.0, 32.0 * 2.0 ** (code - 127)]


def test_more_axes_and_parts_that_are_not_contiguous():
    x, w, bias = operands(6, 20, 64)
    left, right = parts_of(x, w, MIXED)
    want = scaled.multiply(left, right, bias, *map(parse, MIXED), 64)
    apart = [torch.stack([part.view(torch.uint8)] * 2, -1)[..., 0].view(part.dtype)
             for part in right]
    got = scaled.multiply([part.reshape(2, 3, -1) for part in left], apart, bias,
                          *map(parse, MIXED), 64)
    assert torch.equal(got, want.reshape(2, 3, 20))


def test_no_rows():
    _, w, _ = operands(1, 20, 64)
    left, right = parts_of(torch.empty(0, 64, device=DEVICE), w, MIXED)
    assert scaled.multiply(left, right, None, *map(parse, MIXED), 64).shape == (0, 20)


@pytest.mark.parametrize(("x_name", "w_name", "taken"), [
    ("mxfp4", "mxfp4", {10, 11, 12}), ("mxfp4", "mxfp8", {10, 11}), ("mxfp8", "mxfp4", {10, 11}),
    ("mxfp8_e5m2", "mxfp8", {10, 11, 12}), ("mxfp8_e5m2", "mxfp4", {10, 11}),
    ("mxfp4:rceil", "mxfp4:even", {10, 11, 12}), ("mxfp6", "mxfp4", set()),
    ("nvfp4", "nvfp4", set()), ("e2m1[32x32]*e8m0", "mxfp4", set()), ("mxint8", "mxint8", set()),
    ("e4m3[1x16]*e8m0", "mxfp8", set()), ("e4m3[1x32]*f32", "mxfp8", set())])  # fmt: skip
def test_what_devices_take(x_name, w_name, taken):
    found = {major for major in (8, 9, 10, 11, 12)
             if scaled.takes(parse(x_name), parse(w_name), (major, 0))}
    assert found == taken


def test_other_formats_are_refused():
    fmt = parse("mxfp6")
    x, w, _ = operands(2, 4, 32)
    left, right = (quantize_parts(each, fmt) for each in (x, w))
    with pytest.raises(FormatError, match=r"mxfp6.*e2m1, e4m3, e5m2"):
        scaled.multiply(left, right, None, fmt, fmt, 32)


@pytest.mark.parametrize(("names", "n", "capability", "expected"), [
    (("mxfp4", "mxfp4"), 32, (9, 0), "products"), (("mxfp4", "mxfp4"), 32, (10, 0), "scaled"),
    (MIXED, 32, (10, 0), "scaled"), (MIXED, 32, (12, 0), "products"),
    (("mxfp8", "mxfp8"), 32, (10, 0), "library"), (("mxfp8", "mxfp8"), 24, (10, 0), "scaled"),
    (("f32", "mxfp4"), 32, (10, 0), "products")])  # fmt: skip
def test_what_multiplies(names, n, capability, expected, monkeypatch):
    ran: list[str] = []

    def noted(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            ran.append(name)
            return torch.zeros(5, n)

        return run

    monkeypatch.setattr(operators, "capability_of", lambda device: capability)
    for module, name in ((products, "products"), (scaled, "scaled"), (library, "library")):
        monkeypatch.setattr(module, "multiply", noted(name))
    x, w, _ = operands(5, n, 64)
    left = [x] if names[0] == "f32" else quantize_parts(x, parse(names[0]))
    operators.multiply(left, quantize_parts(w, parse(names[1])), None, None, *names, 64,
                       torch.float32)
    assert ran == [expected]


@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), ("mxfp4", "mxfp8")])
@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_every_tile_is_one_that_the_units_take(names, capability):
    for m in (1, 16, 33, 64, 65, 4096):
        way = scaled.way_of(*map(parse, names), m, capability)
        for config in scaled.tiles_for(way, products.bucket_of(m)):
            rows, columns, depth = (config.kwargs[side] for side in ("ROWS", "COLUMNS", "DEPTH"))
            assert max(rows, columns) >= 128 and min(rows, columns) >= 16 and depth % 128 == 0
            assert not way.tiled or (rows % 128 == columns % 128 == 0 and capability == (10, 0))
