"""Products of stored operands are as near to the exact product as sums of float32 are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaleprop.backends.cuda import products
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from tests.backends.cuda.test_quantize_kernels import DEVICE

# of Σ|x̂||ŵ|: sums of float32 in any order, and three roundings of the result
BOUND = 2.0**-20
PAIRS = (
    ("int8[row]*f32", "int8[row]*f32"), ("int8[tensor]*f32+zp", "int8[row]*f32"),
    ("int8[row]*f32+zp", "int8[row]*f32"), ("int8[row]*f32", "int4[1x128]*f32"),
    ("int8[row]*f32+zp", "int4"), ("int4[1x32]*f32", "int4[1x32]*f32"),
    ("e4m3[row]*f32", "e4m3[row]*f32"), ("fp8", "fp8"), ("fp8_e5m2", "e4m3[row]*f32"),
    ("e4m3[1x128]*f32", "e4m3[128x128]*f32"), ("e4m3[row]*f32", "int4[1x128]*f32"),
    ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp8_e5m2", "mxfp6"), ("mxfp6_e3m2", "mxfp6"),
    ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4_2d"), ("e2m1[1x16]*ue5m3*f32", "nvfp4"),
    ("mxint8", "mxint8"), ("int8[1x16]*f32", "int4[1x128]*f32+zp"),
)  # fmt: skip
WEIGHTS = ("int4", "int4[1x128]*f32+zp", "int8[row]*f32", "mxfp4", "nvfp4", "mxfp6", "mxfp8",
           "e4m3[row]*f32", "e4m3[128x128]*f32", "fp8")  # fmt: skip


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m).unsqueeze(1)
    w = torch.randn(n, k, generator=generator)
    return x.to(DEVICE), w.to(DEVICE), torch.randn(n, generator=generator).to(DEVICE)


# of products in float8 units, which keep about 14 bits of a step's sum
FLOAT8_BOUND = 2.0**-11 if DEVICE == "cuda" else BOUND


def assert_near(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None,
                bound: float = BOUND) -> None:
    """x̂ and ŵ in float64."""
    want, most = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        want, most = want + bias, most + bias.abs()
    assert got.shape == want.shape
    rounding = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0
    assert ((got.double() - want).abs() <= most * bound + want.abs() * rounding).all()


@pytest.mark.parametrize("sizes", [(40, 24, 200), (1, 40, 300), (5, 17, 128)])
@pytest.mark.parametrize(("x_name", "w_name"), PAIRS)
def test_quantized_operands(x_name, w_name, sizes):
    x_format, w_format = parse(x_name), parse(w_name)
    x, w, bias = operands(*sizes)
    left, right = quantize_parts(x, x_format), quantize_parts(w, w_format)
    got = products.multiply(left, right, bias, x_format, w_format, sizes[2])
    exact = [dequantize_parts(parts, fmt, of.shape, dtype=torch.float64)
             for parts, fmt, of in ((left, x_format, x), (right, w_format, w))]  # fmt: skip
    assert_near(got, *exact, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("name", WEIGHTS)
def test_quantized_weights_alone(name, m, dtype):
    fmt = parse(name)
    x, w, _ = operands(m, 40, 300)
    x, right = x.to(dtype), quantize_parts(w, fmt)
    got = products.multiply([x], right, None, None, fmt, 300, dtype)
    assert_near(got, x.double(), dequantize_parts(right, fmt, w.shape, dtype=torch.float64), None)


@pytest.mark.parametrize(("x_name", "w_name"), [PAIRS[2], PAIRS[3], ("nvfp4", "nvfp4")])
def test_ranges_of_k_add_up(x_name, w_name):
    x_format, w_format = parse(x_name), parse(w_name)
    x, w, bias = operands(3, 20, 1100)
    left, right = quantize_parts(x, x_format), quantize_parts(w, w_format)
    whole, parts = (products.multiply(left, right, bias, x_format, w_format, 1100, splits=count)
                    for count in (1, 3))  # fmt: skip
    exact = [dequantize_parts(held, fmt, of.shape, dtype=torch.float64)
             for held, fmt, of in ((left, x_format, x), (right, w_format, w))]  # fmt: skip
    assert_near(parts, *exact, bias)
    if x_name == PAIRS[2][0]:  # exact in int32, however it is cut
        assert torch.equal(parts, whole)


def test_sums_of_bytes_are_exact():
    x_format = w_format = parse("int8[row]*f32")
    x, w = torch.full((2, 4096), 127.0), torch.full((3, 4096), -127.0)
    parts = [quantize_parts(each.to(DEVICE), x_format) for each in (x, w)]
    got = products.multiply(*parts, None, x_format, w_format, 4096)
    assert (got == -(127.0**2) * 4096).all()


def test_float8_is_multiplied_as_it_is():
    x_format, w_format = parse("e4m3[row]*f32"), parse("e4m3[1x128]*f32")
    x, w, bias = operands(20, 24, 256)
    left, right = quantize_parts(x, x_format), quantize_parts(w, w_format)
    assert products.way_of(x_format, w_format, 256, fp8=True).dot == torch.float8_e4m3fn
    got = products.multiply(left, right, bias, x_format, w_format, 256, fp8=True)
    exact = [dequantize_parts(held, fmt, of.shape, dtype=torch.float64)
             for held, fmt, of in ((left, x_format, x), (right, w_format, w))]  # fmt: skip
    assert_near(got, *exact, bias, FLOAT8_BOUND)


@pytest.mark.parametrize("name", ["e3m4[row]*f32", "ue5m3[row]*f32"])
def test_other_floats_of_eight_bits_are_not_multiplied_as_float8(name):
    fmt = parse(name)
    assert products.way_of(fmt, fmt, 64, fp8=True).dot != torch.float8_e4m3fn


def test_parts_that_are_not_contiguous():
    fmt = parse("int4[1x32]*f32+zp")
    x, w, bias = operands(3, 8, 64)
    right = quantize_parts(w, fmt)
    apart = [torch.stack([part, part], -1)[..., 0] for part in right]
    want = products.multiply([x], right, bias, None, fmt, 64)
    assert torch.equal(products.multiply([x], apart, torch.stack([bias, bias], 1)[:, 0], None, fmt,
                                         64), want)  # fmt: skip


def test_nan_stays_in_its_row():
    fmt = parse("mxfp8")
    x, w, _ = operands(4, 8, 64)
    x[2, 40] = torch.nan
    got = products.multiply(quantize_parts(x, fmt), quantize_parts(w, fmt), None, fmt, fmt, 64)
    assert got[2].isnan().all() and not got[[0, 1, 3]].isnan().any()


def test_more_axes_and_other_layouts():
    fmt = parse("int4")
    x = torch.randn(128, 2, 3, device=DEVICE).movedim(0, -1)
    w = quantize_parts(torch.randn(10, 128, device=DEVICE), fmt)
    got = products.multiply([x], w, None, None, fmt, 128)
    want = products.multiply([x.contiguous().reshape(6, 128)], w, None, None, fmt, 128)
    assert torch.equal(got, want.reshape(2, 3, 10))


def test_no_rows():
    fmt = parse("int4")
    w = quantize_parts(torch.randn(10, 128, device=DEVICE), fmt)
    assert products.multiply([torch.empty(0, 128, device=DEVICE)], w, None, None, fmt,
                             128).shape == (0, 10)  # fmt: skip


@pytest.mark.parametrize("name", ["nf4", "int3", "int8[channel]*f32", "int4[1x48]*f32",
                                  "int8[4x4]*bf16"])
def test_what_no_kernel_multiplies(name):
    fmt = parse(name)
    with pytest.raises(FormatError, match="kernel"):
        x = torch.zeros(2, 96, dtype=torch.bfloat16)
        products.multiply([x], quantize_parts(torch.zeros(4, 96), fmt), None, None,
                          fmt, 96)


def test_float64_is_left_to_torch():
    with pytest.raises(FormatError, match="float64"):
        products.way_of(torch.float64, parse("int4"), 128)


@pytest.mark.parametrize("bucket", [1, 16, 64, 1024])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_tile_fits_its_way(name, bucket):
    way = products.way_of(torch.bfloat16, parse(name), 4096)
    found = products.fitted(bucket, way)
    assert found and all(way.least <= each.kwargs["DEPTH"] <= way.most for each in found)
