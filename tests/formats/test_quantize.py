"""quantize, dequantize, fake_quantize: shapes, storage, axes, dtypes, given scales, bad inputs."""

import math

import pytest
import torch
from format_support import alike

from scaleprop.errors import FormatError
from scaleprop.formats import (
    ScaledTensor,
    dequantize,
    error_statistics,
    fake_quantize,
    named_formats,
    parse,
    quantize,
    storage_layout,
)

NAMES = [*named_formats(), "int8+zp", "int4[1x32]*f16+zp", "int2[16x16]*bf16+zp", "e4m3[row]*f32",
         "int8[channel]*f32", "int8[channel]*f32+zp", "e4m3[128x128]*f32", "e2m1[32x32]*e8m0",
         "int3[1x5]*f32", "e3m3[1x7]*ue5m3x", "e2m0[row]*bf16", "e5m10[1x16]*e4m3",
         "int4[row]*f16*f32", "e2m1[channel]*e4m3*f32", "nvfp4:mse", "mxfp8:even", "int4:mse"]


def raw(part: torch.Tensor) -> torch.Tensor:
    """The bytes of a part."""
    return part.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_fake_quantize_is_dequantize_of_quantize(name, axis):
    x = torch.randn(3, 37, 50, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        narrow = x.to(dtype)
        scaled = quantize(narrow, name, axis=axis)
        fake = fake_quantize(narrow, name, axis=axis)
        assert fake.dtype == dtype and fake.shape == x.shape
        assert torch.equal(fake, scaled.dequantize()) and torch.equal(fake, dequantize(scaled))
        assert scaled.dtype == dtype and scaled.shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_any_axis_is_the_last_axis_of_the_moved_tensor(name):
    x = torch.randn(6, 20, 34)
    for axis in (0, 1, -2):
        moved = x.movedim(axis, -1).contiguous()
        a, b = quantize(x, name, axis=axis), quantize(moved, name)
        for left, right in zip(a.parts, b.parts, strict=True):
            assert left.shape == right.shape
            assert torch.equal(raw(left), raw(right))
        assert torch.equal(a.dequantize().movedim(axis, -1), b.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name):
    x = torch.randn(20, 66)
    expected = fake_quantize(x, name)
    wide = torch.randn(40, 132)
    wide[::2, ::2] = x
    assert torch.equal(fake_quantize(wide[::2, ::2], name), expected)
    assert torch.equal(fake_quantize(x.t().contiguous().t(), name), expected)
    row = x[:1].expand(20, 66)
    assert torch.equal(fake_quantize(row, name), fake_quantize(row.contiguous(), name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (2, 0, 3), (1,), (1, 1), (5, 1), (7,)])
def test_empty_and_tiny_tensors(name, shape):
    if len(shape) == 1 and parse(name).granularity.kind == "tile":
        with pytest.raises(FormatError, match="two axes"):
            quantize(torch.zeros(shape), name)
        return
    x = torch.randn(shape)
    scaled = quantize(x, name)
    assert scaled.dequantize().shape == x.shape and scaled.codes().shape == x.shape
    assert torch.equal(fake_quantize(x, name), scaled.dequantize())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape, axis", [((4, 96), -1), ((3, 5, 41), -1), ((7, 33), 0)])
def test_storage_is_what_the_layout_says(name, shape, axis):
    scaled = quantize(torch.randn(shape), name, axis=axis)
    layout = storage_layout(scaled.format, shape, axis)
    assert [(tuple(p.shape), p.dtype) for p in scaled.parts] == layout
    assert scaled.nbytes == sum(math.prod(s) * d.itemsize for s, d in layout)
    assert all(part.is_contiguous() for part in scaled.parts)
    again = ScaledTensor.from_parts(scaled.parts, name, shape, axis)
    assert torch.equal(again.dequantize(), scaled.dequantize())


@pytest.mark.parametrize("name, nbytes", [
    ("mxfp8", 256 * 1024 * (1 + 1 / 32)), ("mxfp6", 256 * 1024 * (6 / 8 + 1 / 32)),
    ("mxfp4", 256 * 1024 * (1 / 2 + 1 / 32)), ("nvfp4", 256 * 1024 * (1 / 2 + 1 / 16) + 4),
    ("int4", 256 * 1024 * (1 / 2 + 2 / 128)), ("int3", 256 * 1024 * (3 / 8 + 2 / 128)),
    ("int8", 256 * 1024 + 4), ("int8+zp", 256 * 1024 + 5), ("binary", 256 * 1024 / 8 + 256 * 4),
    ("ternary", 256 * 1024 / 4 + 4), ("e4m3[row]*f32", 256 * 1024 + 256 * 4),
    ("nvfp4_2d", 256 * 1024 / 2 + 16 * 64 + 4),
    ("int4[1x32]*f16+zp", 256 * 1024 * (1 / 2 + 3 / 32)),
])
def test_nbytes_are_exact(name, nbytes):
    assert quantize(torch.randn(256, 1024), name).nbytes == nbytes


def test_scale_shapes_of_every_granularity():
    x = torch.randn(3, 40, 72)
    shapes = {"tensor": (), "row": (3, 40, 1), "channel": (72,), "1x32": (3, 40, 3),
              "16x16": (3, 3, 5)}
    for granularity, shape in shapes.items():
        assert quantize(x, f"int8[{granularity}]*f32").scale.shape == shape
    data = quantize(x, "int8[16x16]*f32").data
    assert data.shape == (3, 40, 80) and data[..., 72:].eq(0).all()


def test_codes_and_values():
    x = torch.tensor([[0.5, -6.0, 1.0, 3.0, -0.0]])
    scaled = quantize(x, "e2m1[1x4]*e8m0")
    assert scaled.codes().dtype == torch.uint8
    assert scaled.codes().tolist() == [[1, 15, 2, 5, 8]]
    assert scaled.values().tolist() == [[0.5, -6.0, 1.0, 3.0, -0.0]]
    assert scaled.data.tolist() == [[0xF1, 0x52, 0x08, 0x00]]
    whole = quantize(torch.tensor([[-7.0, 7.0, 1.0]]), "int4[1x128]*f16")
    assert whole.codes().dtype == torch.int8 and whole.codes().tolist() == [[-7, 7, 1]]
    assert whole.data[0, :2].tolist() == [0x79, 0x01] and whole.data.shape == (1, 64)
    affine = quantize(torch.tensor([[0.0, 15.0, 4.0]]), "int4[row]*f32+zp")
    assert affine.codes().tolist() == [[0, 15, 4]] and affine.zero_point.item() == 0
    eight = quantize(torch.tensor([1.0, -448.0]), "fp8")
    assert eight.codes().tolist() == [0x38, 0xFE]
    assert quantize(torch.tensor([-1.0, 3.0, 1.0]), "int8+zp").values().tolist() == [-64, 191, 64]
    assert "mxfp4" in repr(quantize(torch.zeros(2, 32), "mxfp4"))


def test_float64_data_is_rounded_once():
    """1 + 2^-4 + 2^-40 is above the midpoint of E4M3's 1 and 1.125; in float32 it is on it."""
    x = torch.tensor([[1.0625 + 2.0**-40, 1.75]], dtype=torch.float64)
    assert fake_quantize(x, "mxfp8")[0, 0] == 1.125
    assert fake_quantize(x.float(), "mxfp8")[0, 0] == 1.0


@pytest.mark.parametrize("name", ["int8", "fp8", "int8+zp", "nvfp4", "mxfp4", "int8[row]*f32",
                                  "int8[channel]*f32", "e2m1[1x16]*ue5m3", "int4[1x32]*f16+zp",
                                  "e4m3[16x16]*f32"])
def test_given_scales_are_used(name):
    x = torch.randn(8, 64)
    found = quantize(x, name)
    again = quantize(x, name, scales=found.parts[1:])
    assert torch.equal(again.dequantize(), found.dequantize())
    other = torch.randn(8, 64) * 3
    kept = quantize(other, name, scales=found.parts[1:])
    for left, right in zip(kept.parts[1:], found.parts[1:], strict=True):
        assert torch.equal(raw(left), raw(right))
        assert left.data_ptr() != right.data_ptr()
    assert alike(kept.dequantize(), fake_quantize(other, name, scales=found.parts[1:]))
    assert kept.dequantize().isfinite().all()


def test_static_tensor_scale_with_dynamic_block_scales():
    x = torch.randn(4, 64)
    found = quantize(x, "nvfp4")
    again = quantize(x, "nvfp4", scales=[found.tensor_scale])
    assert torch.equal(again.tensor_scale, found.tensor_scale)
    torch.testing.assert_close(again.dequantize(), found.dequantize(), rtol=1e-5, atol=1e-6)
    larger = quantize(x * 4, "nvfp4", scales=[found.tensor_scale])  # beyond calibration: saturates
    assert larger.scale.float().max() == 448


def test_static_scales_saturate_and_turn_nan_into_zero_or_nan():
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan, 0.26])
    scale = [torch.tensor(0.5)]
    assert fake_quantize(x, "int8", scales=scale).tolist() == [63.5, -63.5, 63.5, -63.5, 0.0, 0.5]
    affine = [torch.tensor(0.5), torch.tensor(128, dtype=torch.uint8)]
    got = fake_quantize(x, "int8+zp", scales=affine)
    assert got.tolist() == [63.5, -64.0, 63.5, -64.0, -64.0, 0.5]
    assert torch.equal(quantize(x, "int8+zp", scales=affine).dequantize(), got)
    float8 = fake_quantize(x, "fp8", scales=scale)
    assert float8[:4].tolist() == [224, -224, 224, -224] and float8[4].isnan()
    assert alike(quantize(x, "fp8", scales=scale).dequantize(), float8)
    four = fake_quantize(x, "e2m1[tensor]*f32", scales=scale)
    assert four.tolist() == [3.0, -3.0, 3.0, -3.0, 0.0, 0.25]


def test_scales_of_one_number_may_have_unit_axes():
    x = torch.randn(4, 8)
    a = fake_quantize(x, "int8", scales=[torch.tensor([0.1])])
    assert torch.equal(a, fake_quantize(x, "int8", scales=[torch.tensor(0.1)]))


@pytest.mark.parametrize("arguments, message", [
    ((torch.arange(8), "int8"), "cannot quantize torch.int64: convert to float32"),
    ((torch.zeros(8, dtype=torch.complex64), "int8"), "cannot quantize torch.complex64"),
    ((torch.zeros(8, dtype=torch.bool), "int8"), "cannot quantize torch.bool"),
    ((torch.zeros(()), "int8"), r"reshape it to \[1\]"),
    ((torch.zeros(4, 8), "int8", 2), "axis 2 is out of range for 2 axes: use -2 to 1"),
    ((torch.zeros(4, 8), "int8", -3), "axis -3 is out of range"),
    ((torch.zeros(4, 8), "int9"), "did you mean int"),
    ((torch.zeros(8), "e4m3[16x16]*f32"), "use 1-D blocks"),
    ((torch.zeros(8), "int8", -1, "up"), "unknown rounding 'up'"),
])
def test_bad_inputs(arguments, message):
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match=message):
            function(*arguments)


@pytest.mark.parametrize("name, scales, message", [
    ("int8", [], r"takes scales=\[scale\], not 0"),
    ("int8+zp", [torch.tensor(1.0)], r"scales=\[scale, zero_point\], not 1"),
    ("mxfp4", [torch.ones(4, 3)], "the scale has shape 4×3; for this tensor it must be 4×2"),
    ("int8[row]*f32", [torch.ones(4)], "must be 4×1"),
    ("nvfp4", [torch.ones(4, 4), torch.ones(2)], "tensor scale has shape 2"),
    ("nvfp4", [torch.ones(3)] * 3, "takes scales="),
])
def test_bad_scales(name, scales, message):
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match=message):
            function(torch.randn(4, 64), name, scales=scales)


def test_bad_parts():
    scaled = quantize(torch.randn(4, 64), "mxfp4")
    with pytest.raises(FormatError, match="has 2 parts, not 1"):
        ScaledTensor.from_parts(scaled.parts[:1], "mxfp4", (4, 64))
    with pytest.raises(FormatError, match=r"data is torch.uint8 \[4, 32\], but is stored as"):
        ScaledTensor.from_parts(scaled.parts, "mxfp4", (4, 128))
    with pytest.raises(FormatError, match=r"scale is torch\.float32"):
        ScaledTensor.from_parts([scaled.data, scaled.scale.float()], "mxfp4", (4, 64))


def test_gradient_passes_straight_through():
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.randn(4, 64)
    y = fake_quantize(x, "mxfp4")
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert torch.equal(y.detach(), fake_quantize(x.detach(), "mxfp4"))
    assert not quantize(x, "mxfp4").data.requires_grad


def test_the_input_is_never_written_to():
    for name in NAMES:
        x = torch.randn(16, 64)
        before = x.clone()
        quantize(x, name)
        fake_quantize(x, name)
        assert torch.equal(x, before), name


def test_error_statistics():
    x = torch.tensor([[6.9, -7.5, 0.2, 0.0, 6.4, 1.0, -0.1, 2.0]])
    scale = torch.tensor([[127]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    scaled = quantize(x, "e2m1[1x8]*e8m0", scales=[scale])
    restored = torch.tensor([[6.0, -6.0, 0.0, 0.0, 6.0, 1.0, 0.0, 2.0]])
    assert torch.equal(scaled.dequantize(), restored)
    sqnr, saturated, underflowed = error_statistics(x, scaled)
    noise = (x - restored).double().square().sum()
    assert sqnr == pytest.approx(10 * math.log10(x.double().square().sum() / noise), rel=1e-12)
    assert (saturated, underflowed) == (1 / 8, 2 / 8)  # 6.9 and 6.4 round to 6 in any case


@pytest.mark.parametrize("name", NAMES)
def test_error_statistics_of_every_format(name):
    x = torch.randn(24, 48)
    scaled = quantize(x, name, axis=0)
    sqnr, saturated, underflowed = error_statistics(x, scaled)
    error = (x - scaled.dequantize()).double().norm() / x.double().norm()
    assert sqnr == pytest.approx(-20 * math.log10(error), abs=1e-3)
    assert 0 <= saturated <= 1
    lost = (scaled.dequantize() == 0) & (x != 0)
    assert underflowed == pytest.approx(float(lost.double().mean()))
    fmt = parse(name)
    if fmt.rule == "exact" and fmt.scale.name == "f32" and fmt.element.min < 0:
        assert saturated == 0


def test_error_statistics_at_the_ends():
    exact = torch.tensor([[1.0, 2.0]])
    assert error_statistics(exact, quantize(exact, "mxfp8")) == (math.inf, 0.0, 0.0)
    assert error_statistics(torch.zeros(0, 4), quantize(torch.zeros(0, 4), "int8"))[0] == math.inf
    with pytest.raises(FormatError, match="shape"):
        error_statistics(torch.zeros(3), quantize(exact, "mxfp8"))
