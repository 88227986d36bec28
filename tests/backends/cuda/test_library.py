"""Library products, the layouts they want, and which devices they are on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from scaleprop.backends.cuda import devices, library, operators
from scaleprop.backends.cuda.backend import CudaBackend
from scaleprop.backends.cuda.layouts import swizzled, unswizzled
from scaleprop.errors import BackendUnavailable
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.tensor import dequantize_parts
from tests.backends.cuda.test_product_kernels import FLOAT8_BOUND, assert_near, operands


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (300, 12)])
def test_swizzled_scales_lie_where_the_library_reads_them(shape):
    rows, columns = shape
    scales = torch.randint(1, 255, shape, dtype=torch.uint8)
    flat = swizzled(scales)
    wide = -(-columns // 4)
    expected = torch.zeros(-(-rows // 128) * wide * 512, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            tile = i // 128 * wide + j // 4
            expected[tile * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] = scales[i, j]
    assert torch.equal(flat, expected)
    assert torch.equal(unswizzled(flat, rows, columns), scales)


def exact(parts: list[Tensor], name: str, shape: torch.Size) -> Tensor:
    return dequantize_parts(parts, parse(name), shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("x_name", "w_name"), [
    ("fp8", "fp8"), ("e4m3[row]*f32", "e4m3[row]*f32"), ("fp8_e5m2", "e4m3[row]*f32")])  # fmt: skip
def test_float8(x_name, w_name, dtype):
    x, w, bias = operands(6, 32, 64)
    left, right = quantize_parts(x, parse(x_name)), quantize_parts(w, parse(w_name))
    assert library.kind_of(parse(x_name), parse(w_name), 32, 64, (8, 9)) == "float8"
    got = library.multiply("float8", left, right, parse(x_name), parse(w_name),
                           bias if dtype == torch.float32 else None, dtype)
    assert_near(got, exact(left, x_name, x.shape), exact(right, w_name, w.shape),
                bias if dtype == torch.float32 else None, FLOAT8_BOUND)


def as_documented(a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any,
                  swizzle_a: Any, swizzle_b: Any, output_dtype: torch.dtype) -> Tensor:
    """What the library says that it computes of scales in tiles."""
    assert recipe_a == recipe_b and swizzle_a == swizzle_b
    two = isinstance(scale_a, list)
    if two:
        assert recipe_a == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        assert swizzle_a == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    else:
        assert (recipe_a, swizzle_a) == (ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4)
    name = "e2m1" if a.dtype == torch.float4_e2m1fn_x2 else "e4m3"
    fmt = parse("nvfp4" if two else f"{name}[1x32]*e8m0")

    def values(data: Tensor, scale: Any) -> Tensor:
        inner, outer = scale if two else (scale, None)
        k = data.shape[1] * (2 if name == "e2m1" else 1)
        blocks = unswizzled(inner, len(data), k // fmt.granularity.columns)
        raw = data.view(torch.uint8) if name == "e2m1" else data
        parts = [raw, blocks, *([] if outer is None else [outer])]
        return dequantize_parts(parts, fmt, (len(data), k), dtype=torch.float64)

    return (values(a, scale_a) @ values(b.t(), scale_b).t()).to(output_dtype)


@pytest.mark.parametrize(("x_name", "w_name"), [
    ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4_2d"),
    ("e4m3[32x32]*e8m0", "mxfp8:rceil")])  # fmt: skip
def test_block_scales_are_given_as_documented(x_name, w_name, monkeypatch):
    monkeypatch.setattr(library, "scaled_mm", as_documented)
    x, w, bias = operands(6, 48, 128)
    left, right = quantize_parts(x, parse(x_name)), quantize_parts(w, parse(w_name))
    kind = library.kind_of(parse(x_name), parse(w_name), 48, 128, (10, 0))
    assert kind is not None
    got = library.multiply(kind, left, right, parse(x_name), parse(w_name), bias, torch.float32)
    assert_near(got, exact(left, x_name, x.shape), exact(right, w_name, w.shape), bias)


def long_blocks(a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor,
                recipe_b: Any, swizzle_a: Any, swizzle_b: Any, output_dtype: torch.dtype) -> Tensor:
    """What the library says of scales of 1×128 and 128×128: dtypes, shapes and strides are those
    that ``aten._scaled_mm_v2`` demands on a device."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert swizzle_a == swizzle_b == SwizzleType.NO_SWIZZLE
    assert output_dtype in (torch.bfloat16, torch.float32)

    def values(data: Tensor, scale: Tensor, recipe: Any) -> Tensor:
        rows, k = data.shape
        square = recipe == ScalingType.BlockWise128x128
        groups = -(-k // 128)
        if square:
            shape, strides = (-(-groups // 4) * 4, -(-rows // 128)), (1, -(-groups // 4) * 4)
            spread = scale.t()[:, :groups].repeat_interleave(128, 0)[:rows]
        else:
            assert recipe == ScalingType.BlockWise1x128
            shape, strides, spread = (rows, groups), (1, rows), scale
        assert scale.shape == shape and scale.stride() == strides
        return data.double() * spread.repeat_interleave(128, 1)[:, :k].double()

    return (values(a, scale_a, recipe_a) @ values(b.t(), scale_b, recipe_b).t()).to(output_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("x_name", "w_name"), [
    ("e4m3[1x128]*f32", "e4m3[1x128]*f32"), ("e4m3[1x128]*f32", "e4m3[128x128]*f32"),
    ("e4m3[128x128]*f32", "e4m3[1x128]*f32:pow2")])  # fmt: skip
@pytest.mark.parametrize("m", [1, 152])
def test_long_blocks_are_given_as_documented(m, x_name, w_name, dtype, monkeypatch):
    monkeypatch.setattr(library, "scaled_mm", long_blocks)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    x, w, _ = operands(m, 272, 640)
    left, right = quantize_parts(x, parse(x_name)), quantize_parts(w, parse(w_name))
    kind = library.kind_of(parse(x_name), parse(w_name), 272, 640, (9, 0))
    assert kind == "float8_blocks"
    got = library.multiply(kind, left, right, parse(x_name), parse(w_name), None, dtype)
    wanted = exact(left, x_name, x.shape), exact(right, w_name, w.shape)
    if dtype == torch.float16:
        assert torch.equal(got, (wanted[0] @ wanted[1].t()).to(torch.float32).to(dtype))
    else:
        assert_near(got, *wanted, None)


@pytest.mark.parametrize(("version", "capability"), [
    ("12.8", (9, 0)), ("12.9", (8, 9)), ("12.9", (10, 0)), (None, (9, 0))])  # fmt: skip
def test_long_blocks_elsewhere(version, capability, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    fmt = parse("e4m3[1x128]*f32")
    assert library.kind_of(fmt, fmt, 128, 128, capability) is None


@pytest.mark.parametrize(("x_name", "w_name", "n", "k", "capability"), [
    ("fp8", "fp8", 32, 64, (8, 0)), ("fp8", "fp8", 24, 64, (9, 0)), ("fp8", "fp8", 32, 72, (9, 0)),
    ("fp8_e5m2", "fp8_e5m2", 32, 64, (9, 0)), ("mxfp8", "mxfp8", 32, 64, (9, 0)),
    ("mxfp8", "mxfp4", 32, 64, (10, 0)), ("mxfp6", "mxfp6", 32, 64, (10, 0)),
    ("mxfp8", "mxfp8", 32, 80, (10, 0)), ("mxfp4", "mxfp4", 32, 64, (10, 0)),
    ("e4m3[row]*f32", "e5m2[row]*f32", 32, 64, (9, 0)),
    ("e5m2[1x128]*f32", "e4m3[128x128]*f32", 128, 128, (9, 0)),
    ("nvfp4", "mxfp8", 32, 64, (10, 0)), ("fp8", "e4m3[1x128]*f32", 128, 128, (9, 0)),
    ("int8", "int8", 32, 64, (9, 0))])  # fmt: skip
def test_what_the_library_does_not_take(x_name, w_name, n, k, capability, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert library.kind_of(parse(x_name), parse(w_name), n, k, capability) is None


def test_rows_whose_scales_are_no_whole_words_are_left_to_a_kernel(monkeypatch):
    monkeypatch.setattr(library, "scaled_mm", long_blocks)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(operators, "capability_of", lambda device: (9, 0))
    ran: list[int] = []
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda kind, x, *more: ran.append(len(x[0])) or
                        multiply(kind, x, *more))
    fmt = "e4m3[1x128]*f32"
    for m in (1, 4, 33):
        x, w, _ = operands(m, 32, 256)
        left, right = quantize_parts(x, parse(fmt)), quantize_parts(w, parse(fmt))
        got = operators.multiply(left, right, None, None, fmt, fmt, 256, torch.float32)
        assert_near(got, exact(left, fmt, x.shape), exact(right, fmt, w.shape), None, FLOAT8_BOUND)
    assert ran == [4]


def test_float64_is_rounded_by_the_library_to_float32(monkeypatch):
    monkeypatch.setattr(library, "scaled_mm", as_documented)
    x, w, _ = operands(6, 48, 128)
    fmt = parse("mxfp8")
    left, right = quantize_parts(x, fmt), quantize_parts(w, fmt)
    wide, single = (library.multiply("mx", left, right, fmt, fmt, None, dtype)
                    for dtype in (torch.float64, torch.float32))
    assert wide.dtype == torch.float64 and torch.equal(wide, single.double())


def test_support_follows_the_units():
    by_device = {capability: {each.operation: each.how for each in devices.support(capability)}
                 for capability in devices.KNOWN}  # fmt: skip
    assert by_device[8, 0]["FP8 × FP8"] == "exact" and by_device[9, 0]["FP8 × FP8"] == "native"
    assert by_device[9, 0]["NVFP4 × NVFP4"] == "exact"
    assert by_device[9, 0]["MXFP4 × MXFP4"] == by_device[12, 0]["MXFP4 × MXFP8"] == "exact"
    assert by_device[10, 0]["MXFP4 × MXFP8"] == by_device[12, 0]["MXFP4 × MXFP4"] == "native"
    assert by_device[10, 0]["NVFP4 × NVFP4"] == by_device[12, 0]["NVFP4 × NVFP4"] == "native"
    old = devices.support((7, 5))
    assert {each.how for each in old} == {"refused"} and "8.0" in old[0].detail


def test_a_device_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendUnavailable, match=r"7\.5.*backend='inductor'"):
        CudaBackend().lower(None)  # type: ignore[arg-type]
