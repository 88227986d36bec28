"""Products of few rows with weights decoded in pairs, against exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaleprop.backends.cuda import words
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from tests.backends.cuda.test_product_kernels import assert_near, operands
from tests.backends.cuda.test_quantize_kernels import DEVICE

FORMATS = (
    "int4", "int4+zp", "int4[1x128]*f32", "int4[1x32]*bf16", "int4[row]*f32", "int4[tensor]*f32",
    "mxfp4", "nvfp4", "nvfp4_2d", "e2m1[1x16]*ue5m3", "e2m1[1x32]*f32", "e2m1[row]*f32",
    "e2m1[32x32]*e8m0", "fp8", "fp8_e5m2", "e4m3[row]*f32", "e4m3[1x128]*f32", "mxfp8",
    "mxfp8_e5m2", "e4m3[128x128]*f32", "e3m4[row]*f32",
)  # fmt: skip


def near(x: Tensor, parts: list[Tensor], name: str, shape: torch.Size, bias: Tensor | None = None,
         **options: int) -> None:
    fmt = parse(name)
    assert words.takes(fmt, shape[1]) and words.is_plain(parts, fmt, shape[1])
    got = words.multiply(x, parts, bias, fmt, shape[1], torch.float32, **options)
    exact = dequantize_parts(parts, fmt, shape, dtype=torch.float64)
    assert_near(got, x.double(), exact, bias)


@pytest.mark.parametrize("sizes", [(3, 24, 200), (1, 70, 512)])
@pytest.mark.parametrize("name", FORMATS)
def test_as_near_as_sums_of_float32(name, sizes):
    x, w, bias = operands(*sizes)
    near(x.bfloat16(), quantize_parts(w, parse(name)), name, w.shape, bias)


@pytest.mark.parametrize("m", [2, 9, 33, 64])
def test_any_count_of_rows(m):
    x, w, _ = operands(m, 80, 256)
    near(x.bfloat16(), quantize_parts(w, parse("mxfp4")), "mxfp4", w.shape)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "e4m3[row]*f32"])
def test_ranges_of_k_add_up(name):
    x, w, bias = operands(2, 40, 1024)
    near(x.bfloat16(), quantize_parts(w, parse(name)), name, w.shape, bias, splits=3)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8", "fp8_e5m2", "e3m4[tensor]*f32", "int4"])
def test_every_code(name):
    """A row of ones picks each weight; what is summed is one number."""
    fmt = parse(name)
    count = 1 << fmt.bits
    largest = getattr(fmt.element, "max_code", count)
    codes = torch.tensor([code for code in range(count)
                          if fmt.bits == 4 or code & 0x7F <= largest], dtype=torch.uint8)
    w = torch.zeros(len(codes), 128)
    parts = quantize_parts(w + 1.0, fmt)
    data = parts[0].view(torch.uint8).clone()
    data[:] = 0
    data[:, 1] = codes | (codes << 4) if fmt.bits == 4 else codes
    parts[0] = data.view(parts[0].dtype)
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 2 if fmt.bits == 4 else 1] = 1.0
    got = words.multiply(x.to(DEVICE), [part.to(DEVICE) for part in parts], None, fmt, 128,
                         torch.float32)
    exact = dequantize_parts(parts, fmt, w.shape)
    assert torch.equal(got[0].cpu(), exact @ x[0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_other_dtypes(dtype):
    x, w, _ = operands(3, 24, 256)
    parts, fmt = quantize_parts(w, parse("nvfp4")), parse("nvfp4")
    wide, narrow = (words.multiply(x.bfloat16(), parts, None, fmt, 256, kind)
                    for kind in (torch.float32, dtype))
    assert torch.equal(narrow, wide.to(dtype))


def test_blocks_of_zeros_and_small_scales():
    x, w, _ = operands(2, 24, 256)
    w[3] = 0.0
    w[4, 32:64] = 0.0
    w[5] *= 2.0**-80
    near(x.bfloat16(), quantize_parts(w, parse("mxfp4")), "mxfp4", w.shape)


@pytest.mark.parametrize(("name", "value"), [
    ("mxfp4", torch.nan), ("nvfp4", torch.nan), ("mxfp4", 2.0**14), ("mxfp4", 2.0**-100),
    ("mxfp8_e5m2", torch.inf)])  # fmt: skip
def test_what_is_not_plain(name, value):
    w, fmt = torch.ones(4, 64), parse(name)
    assert words.is_plain(quantize_parts(w, fmt), fmt, 64)
    w[1] = value
    assert not words.is_plain(quantize_parts(w, fmt), fmt, 64)


def test_codes_of_nan_are_not_plain():
    fmt = parse("fp8")
    data, scale = quantize_parts(torch.ones(4, 64), fmt)
    data[1, 2] = torch.nan
    assert not words.is_plain([data, scale], fmt, 64)


@pytest.mark.parametrize(("name", "k"), [
    ("nf4", 64), ("int3", 64), ("int8", 64), ("mxfp6", 64), ("mxfp4", 36), ("int4[1x16]*f32", 64),
    ("int4[1x32]*e8m0", 64), ("int4[row]*f32+zp", 64), ("e2m1[1x512]*e8m0", 512)])  # fmt: skip
def test_what_is_left_to_others(name, k):
    fmt = parse(name)
    assert not words.takes(fmt, k)
    with pytest.raises(FormatError, match="in pairs"):
        words.multiply(torch.zeros(1, k, dtype=torch.bfloat16),
                       quantize_parts(torch.ones(8, k), fmt), None, fmt, k, torch.float32)


def test_more_axes_and_rows_that_are_not_contiguous():
    x, w, _ = operands(6, 24, 256)
    parts, fmt = quantize_parts(w, parse("mxfp4")), parse("mxfp4")
    wide = x.bfloat16().repeat(1, 2).reshape(2, 3, 512)[..., :256]
    got = words.multiply(wide, parts, None, fmt, 256, torch.float32)
    want = words.multiply(x.bfloat16(), parts, None, fmt, 256, torch.float32)
    assert torch.equal(got.reshape(6, 24), want)


def test_no_rows():
    fmt, x = parse("mxfp4"), torch.zeros(0, 64, dtype=torch.bfloat16, device=DEVICE)
    parts = quantize_parts(torch.ones(8, 64, device=DEVICE), fmt)
    got = words.multiply(x, parts, None, fmt, 64, torch.float32)
    assert got.shape == (0, 8)
