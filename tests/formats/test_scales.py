"""Scales: every rule against exact fractions, and the corner cases that references disagree on."""

import math

import numpy as np
import pytest
import torch
from format_support import alike, same

from scaleprop.formats import fake_quantize, named_formats, parse, quantize, reference
from scaleprop.formats.scaled import FLT_MAX

E8M0 = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "mxint8", "int4", "e8m3"]


def amax_edges() -> torch.Tensor:
    """Powers of two, thresholds of every rule times powers of two, and their neighbours."""
    seeds = [m * 2.0**e for e in (-149, -140, -130, -127, -126, -125, -20, 0, 1, 50, 119, 120, 126)
             for m in (1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.9921875)]
    seeds = np.array([*seeds, 448, 6, 7.5, 28, 57344, 127, 7, FLT_MAX], dtype=np.float32)
    every = np.concatenate([seeds, np.nextafter(seeds, np.float32(0)),
                            np.nextafter(seeds, np.float32(FLT_MAX))])
    return torch.from_numpy(every[every > 0])


def fast_scales(amax: torch.Tensor, name: str) -> torch.Tensor:
    scaled = quantize(torch.stack([amax, -amax * 0.5], dim=-1), name)
    from scaleprop.formats.scales import decoded_scale
    return decoded_scale(scaled.scale, scaled.format).squeeze(-1)


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even", "pow2"])
@pytest.mark.parametrize("item", E8M0)
def test_power_of_two_scales_equal_exact_fractions(item, rule):
    amax = amax_edges()
    for scale in ("e8m0", "f32", "e4m3"):
        fmt = parse(f"{item}[row]*{scale}:{rule}")
        expected = [reference.scale_of([float(a)], fmt) for a in amax]
        assert fast_scales(amax, fmt).tolist() == expected, scale


@pytest.mark.parametrize("scale", ["f32", "bf16", "f16", "e4m3", "ue5m3", "ue5m3x"])
@pytest.mark.parametrize("item", ["e4m3", "e2m1", "int8", "int4", "nf4"])
def test_exact_scales_equal_exact_fractions(item, scale):
    spread = torch.exp(torch.randn(300) * 20).clamp(max=FLT_MAX)
    amax = torch.cat([amax_edges(), torch.rand(300) * 10, spread])
    fmt = parse(f"{item}[row]*{scale}:exact")
    if scale == "f32":
        amax = amax[amax > 1e-30]  # below, amax/max is a subnormal: division rounds it, once
    got = fast_scales(amax.double(), fmt)
    assert got.tolist() == [reference.scale_of([float(a)], fmt) for a in amax]
    if scale == "f32":
        assert torch.equal(fast_scales(amax, fmt), got)


def test_float64_scales_do_not_round_the_exponent_up():
    below = math.nextafter(2.0, 0.0)  # float32 would make it 2.0
    x = torch.tensor([[below, 0.5]], dtype=torch.float64)
    fmt = "e4m3[row]*e8m0:floor"
    assert quantize(x, fmt).scale.float().item() == 2.0**-8
    assert quantize(x.float(), fmt).scale.float().item() == 2.0**-7


BLOCKED = ["mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "int4", "nf4", "fp8", "int8", "int8+zp",
           "mxfp4:rceil", "mxfp8:mse", "nvfp4:fouroversix", "nvfp4:mse", "int4:mse", "fp4_ue5m3",
           "int4[1x32]*f16+zp:mse", "e3m4[1x32]*bf16"]


@pytest.mark.parametrize("name", BLOCKED)
def test_zero_blocks_stay_zero_with_their_signs(name):
    x = torch.zeros(4, 64)
    x[1] = -0.0
    got = fake_quantize(x, name)
    assert torch.equal(got, torch.zeros(4, 64))
    has_sign = not parse(name).zero_point and parse(name).element.name[0] == "e"
    if has_sign:
        assert same(got, x) and same(quantize(x, name).dequantize(), x)


def test_scales_of_zero_blocks():
    zero = torch.zeros(2, 32)
    assert quantize(zero, "mxfp4").scale.view(torch.uint8).tolist() == [[0], [0]]
    assert quantize(zero, "int8").scale.item() == 1.0
    assert quantize(zero, "fp8").scale.item() == 1.0
    nvfp4 = quantize(zero, "nvfp4")
    assert nvfp4.tensor_scale.item() == 1.0 and nvfp4.scale.float().eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BLOCKED)
def test_nan_or_infinity_makes_its_whole_block_nan(name, bad):
    x = torch.randn(4, 256)
    x[2, 5] = bad
    fmt = parse(name)
    got = fake_quantize(x, name)
    width = fmt.block[1] if fmt.block and not fmt.two_level else None
    if width is None:
        assert got.isnan().all()
    else:
        assert got[2, :width].isnan().all()
        assert got[2, width:].isfinite().all() and got[[0, 1, 3]].isfinite().all()
    assert alike(quantize(x, name).dequantize(), got)


def test_nan_block_has_e8m0_code_255():
    x = torch.ones(1, 64)
    x[0, 3] = math.nan
    assert quantize(x, "mxfp8").scale.view(torch.uint8).tolist()[0][0] == 255


@pytest.mark.parametrize("name", [n for n in BLOCKED if "zp" not in n])
def test_flt_max_stays_finite(name):
    x = torch.full((2, 128), FLT_MAX)
    x[1] *= -0.75
    got = fake_quantize(x, name)
    assert got.isfinite().all() and same(quantize(x, name).dequantize(), got)
    if parse(name).scale.name == "f16":  # the largest scale is 65504: saturates
        assert got.abs().max() == 65504 * parse(name).element.max
    else:
        assert ((got - x).abs() <= 0.27 * x.abs()).all()


def test_range_that_overflows_is_nan_with_a_zero_point():
    x = torch.tensor([FLT_MAX, -FLT_MAX])
    assert quantize(x, "int8+zp").scale.isnan() and fake_quantize(x, "int8+zp").isnan().all()


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("size", [2.0**-126, 2.0**-130, 2.0**-148])
def test_subnormal_blocks_stay_finite_and_no_larger_than_double(name, size):
    x = torch.randn(4, 64).clamp(-1, 1) * size
    got = fake_quantize(x, name)
    assert got.isfinite().all() and got.abs().max() <= 2 * x.abs().max() + 2.0**-127 * 2
    assert alike(quantize(x, name).dequantize(), got)


def test_e8m0_codes_0_and_254_decode_exactly():
    tiny = torch.tensor([[2.0**-127, 2.0**-126, -(2.0**-127)]])
    scaled = quantize(tiny, "mxint8")
    assert scaled.scale.view(torch.uint8).item() == 1
    tiny = torch.tensor([[2.0**-127, -(2.0**-128)]])
    scaled = quantize(tiny, "mxint8")
    assert scaled.scale.view(torch.uint8).item() == 0 and torch.equal(scaled.dequantize(), tiny)
    code_254 = torch.tensor([[254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    x = torch.tensor([[2.0**127, -(2.0**126), 0.0, 2.0**127]])
    scaled = quantize(x, "e2m1[1x4]*e8m0", scales=[code_254])
    assert torch.equal(scaled.dequantize(), x)
    assert torch.equal(scaled.values(), torch.tensor([[1.0, -0.5, 0.0, 1.0]]))


def test_scale_bound_is_the_largest_that_cannot_overflow():
    for name, fmt in named_formats().items():
        bound = fmt.scale_bound
        assert bound * fmt.element.max <= FLT_MAX, name
        following = bound * (1 + 2.0**-fmt.scale.fraction_bits)
        assert bound == fmt.scale.max or following * fmt.element.max > FLT_MAX, name


def test_ties_round_to_even_codes():
    x = torch.tensor([[6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5.0, -0.25]])
    got = fake_quantize(x, "e2m1[row]*e8m0")
    assert got.tolist() == [[6.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.0, -4.0, -0.0]]
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, "int8").tolist() == [127, 0, 2, 2, 0, -2]


def nvfp4_scalar(x: np.ndarray, block: int = 16, top: float = 448.0):
    """TransformerEngine's order of operations in float32, one block at a time."""
    import ml_dtypes
    f32, largest = np.float32, np.float32(FLT_MAX)
    amax = np.abs(x).max()
    encode = min(f32(top * 6) / amax, largest)
    values, scales = [], []
    for chunk in x.reshape(-1, block):
        base = np.abs(chunk).max() * f32(encode * f32(1 / 6))
        scale = min(base, f32(448)).astype(ml_dtypes.float8_e4m3fn).astype(f32)
        inverse = f32(1) / f32(scale * f32(f32(1) / encode)) if scale > 0 else largest
        units = np.clip(chunk * min(inverse, largest), f32(-6), f32(6))
        values.append(units.astype(ml_dtypes.float4_e2m1fn).astype(f32))
        scales.append(scale)
    return np.concatenate(values), np.array(scales), amax


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0])
def test_nvfp4_follows_transformer_engine(spread):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator)
    x = (x * torch.exp(spread * torch.randn(64, 1, generator=generator))).bfloat16().float()
    scaled = quantize(x, "nvfp4")
    with np.errstate(divide="ignore", over="ignore"):
        values, scales, amax = nvfp4_scalar(x.numpy())
    assert torch.equal(scaled.scale.float().flatten(), torch.from_numpy(scales))
    assert torch.equal(scaled.values().flatten(), torch.from_numpy(values))
    exact = values.astype(np.float64) * np.repeat(scales, 16).astype(np.float64) * amax / 2688
    np.testing.assert_allclose(scaled.dequantize().flatten().numpy(), exact, rtol=2e-7)


def test_nvfp4_all_zero_blocks_have_scale_zero():
    x = torch.randn(2, 32)
    x[0, :16] = 0
    scaled = quantize(x, "nvfp4")
    assert scaled.scale.float()[0, 0] == 0 and scaled.dequantize()[0, :16].eq(0).all()


def test_nvfp4_2d_scales_are_transpose_consistent():
    x = torch.randn(64, 96)
    a, b = fake_quantize(x, "nvfp4_2d"), fake_quantize(x.t().contiguous(), "nvfp4_2d")
    assert torch.equal(a, b.t())
    assert quantize(x, "nvfp4_2d").scale.shape == (4, 6)


def test_errors_on_gaussians_are_the_published_ones():
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def error(name):
        return float((fake_quantize(x, name) - x).norm() / x.norm())

    assert error("nvfp4") == pytest.approx(0.0950, abs=5e-4)
    assert error("nvfp4:fouroversix") == pytest.approx(0.0869, abs=5e-4)
    assert error("nvfp4_2d") == pytest.approx(0.1115, abs=1e-3)


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "int4[1x32]*f16+zp", "nvfp4", "mxfp4",
                                  "int8[row]*f32", "ternary[row]*f32", "e4m3[row]*f32",
                                  "nf4", "int4[1x32]*f16*f32"])
def test_mse_search_is_never_worse_on_any_group(name):
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)) ** 3
    fmt = parse(name)
    plain = fmt.replace(rule="floor" if fmt.scale.name == "e8m0" else "exact")
    groups = (32, -1, fmt.block[1] if fmt.block else 256)

    def errors(f):
        return (fake_quantize(x, f) - x).square().reshape(groups).sum(-1)

    assert (errors(fmt.replace(rule="mse")) <= errors(plain) * (1 + 1e-5)).all()
    assert errors(fmt.replace(rule="mse")).sum() <= errors(plain).sum()


def test_four_over_six_takes_the_better_of_two_scales():
    x = torch.randn(16, 128)
    scaled = quantize(x, "nvfp4:4over6")
    assert scaled.tensor_scale.item() == pytest.approx(float(x.abs().max()) / 1536)
    # amax lands on 6 or on 4 in every block
    top = scaled.values().abs().reshape(16, 8, 16).amax(-1)
    assert set(top.unique().tolist()) == {4.0, 6.0}


@pytest.mark.parametrize("name", ["mxfp4:rms", "e2m1[row]*f32:rms", "e2m1[16x16]*e8m0:rms",
                                  "e2m1[tensor]*f32:rms"])
def test_rms_scales_are_quartets(name):
    """2^⌊log2(2.92247856/6·σ)⌋; what lies beyond 6 saturates; padding does not count."""
    x = torch.randn(33, 80) * torch.logspace(-3, 3, 33).unsqueeze(1)
    scaled = quantize(x, name)
    fmt = parse(name)
    rows, columns = fmt.block or (33 if name.startswith("e2m1[tensor]") else 1, 80)
    scale = scaled.scale.float().reshape(-(-33 // rows), -(-80 // columns))
    for i, j in np.ndindex(*scale.shape):
        group = x[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns].double().numpy()
        sigma = math.sqrt((group**2).sum() / group.size)
        assert float(scale[i, j]) == 2.0 ** math.floor(math.log2(2.92247856 / 6 * sigma))
    edge = 6 / 2.92247856
    for factor, exponent in ((1 + 1e-6, 3), (1 - 1e-6, 2)):
        same_all = torch.full((4, 32), 8 * edge * factor)
        assert (quantize(same_all, "mxfp4:rms").scale.float() == 2.0**exponent).all()
    peak = torch.tensor([[100.0] + [1.0] * 31])  # σ is 17.7: scale 8, and 100 becomes 48
    assert fake_quantize(peak, "mxfp4:rms")[0, 0] == 48


def test_rms_scales_of_zero_and_of_what_is_not_finite():
    assert not fake_quantize(torch.zeros(2, 32), "mxfp4:rms").any()
    assert quantize(torch.zeros(2, 32), "mxfp4:rms").scale.float().max() == 2.0**-127
    assert (quantize(torch.zeros(2, 32), "e2m1[row]*f32:rms").scale == 1).all()
    bad = torch.ones(2, 32)
    bad[0, 3] = math.nan
    assert fake_quantize(bad, "mxfp4:rms")[0].isnan().all()
    huge = torch.full((1, 32), FLT_MAX)
    assert fake_quantize(huge, "mxfp4:rms").isfinite().all()


def test_absmean_of_bitnet_ignores_padding():
    x = torch.randn(8, 50)
    got = fake_quantize(x, "ternary[1x32]*f32")
    for block in (slice(0, 32), slice(32, 50)):
        scale = x[:, block].abs().mean(-1, keepdim=True)
        expected = (x[:, block] / scale).round().clamp(-1, 1) * scale
        torch.testing.assert_close(got[:, block], expected)
    binary = fake_quantize(x, "binary")
    torch.testing.assert_close(binary, x.sign() * x.abs().mean(-1, keepdim=True))


@pytest.mark.parametrize("seed", range(5))
def test_int8_with_zero_point_equals_onnx_dynamic_quantize_linear(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(333, generator=generator) * 3 + (seed - 2)
    x = x.abs() if seed == 4 else x
    high, low = np.float32(max(x.max(), 0)), np.float32(min(x.min(), 0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.round(-low / scale), 0, 255).astype(np.uint8)
    codes = np.clip(np.round(x.numpy() / scale) + np.float32(zero), 0, 255).astype(np.uint8)
    scaled = quantize(x, "int8+zp")
    assert scaled.scale.item() == scale and scaled.zero_point.item() == zero
    assert torch.equal(scaled.codes(), torch.from_numpy(codes))
    assert scaled.data.dtype == torch.uint8
    expected = (codes.astype(np.float32) - np.float32(zero)) * scale
    assert torch.equal(scaled.dequantize(), torch.from_numpy(expected))
