"""The dequantize kernel equals the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from scaleprop.backends.cuda.dequantizing import dequantize
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from tests.backends.cuda.test_quantize_kernels import BLOCKS, DEVICE, ROWS, everything, sample


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    unknown = want.isnan()
    assert torch.equal(got.isnan(), unknown)
    assert torch.equal(got[~unknown], want[~unknown])


@pytest.mark.parametrize(("name", "kind"), everything(
    [*BLOCKS, *ROWS, "int4", "int4[1x128]*f32+zp", "int8[4x4]*bf16"],
    ("mxfp8", "mxfp6", "nvfp4", "e2m1[1x16]*ue5m3*f32", "int4[1x128]*f32+zp", "int8[4x4]*bf16",
     "int8[row]*f32+zp", "e5m2[tensor]*f32")))
def test_all_formats(name, kind):
    fmt, x = parse(name), sample(kind)
    parts = quantize_parts(x, fmt)
    assert_same(dequantize(parts, fmt, x.shape[1]), dequantize_parts(parts, fmt, x.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mxfp6", "nvfp4", "int4[1x128]*f32+zp", "e4m3[row]*f32"])
def test_narrower_results_are_rounded_once(name, dtype):
    fmt, x = parse(name), sample("float32")
    parts = quantize_parts(x, fmt)
    want = dequantize_parts(parts, fmt, x.shape, dtype=dtype)
    assert_same(dequantize(parts, fmt, x.shape[1], dtype), want)


def test_more_axes():
    fmt, x = parse("mxfp8"), torch.randn(2, 3, 70, device=DEVICE)
    parts = quantize_parts(x, fmt)
    assert_same(dequantize(parts, fmt, 70), dequantize_parts(parts, fmt, x.shape))


@pytest.mark.parametrize("name", ["nf4", "int8[channel]*f32", "int3"])
def test_what_no_kernel_reads(name):
    x = torch.randn(4, 128)
    with pytest.raises(FormatError, match="no kernel"):
        dequantize(quantize_parts(x, parse(name)), parse(name), 128)


def test_infinity_of_e5m2():
    fmt = parse("e5m2[1x32]*e8m0")
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).reshape(8, 32)
    parts = [codes.view(torch.float8_e5m2),
             torch.full((8, 1), 127, dtype=torch.uint8, device=DEVICE).view(torch.float8_e8m0fnu)]
    want = dequantize_parts(parts, fmt, (8, 32))
    assert want.isinf().any()
    assert_same(dequantize(parts, fmt, 32), want)
