"""Operands of low-precision products: what they decode to, in which dtype, by whose scales."""

import itertools
import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from scaleprop import ops
from scaleprop.errors import FormatError
from scaleprop.formats import fake_quantize, named_formats, parse
from scaleprop.formats.elements import ELEMENTS
from scaleprop.ops.operands import eden_operand, exact_dtype, quantize_operand, significand_bits

OTHERS = ["mxfp4:rms", "mxfp8:rceil", "mxfp4:even", "nvfp4:fouroversix", "e4m3[1x128]*f32",
          "e4m3[128x128]*f32", "e2m1[32x32]*e8m0", "e4m3[row]*f32:pow2", "e5m2[channel]*f32",
          "e4m3[1x16]*e4m3*f32"]
FORMATS = [*named_formats(), *OTHERS]
ROUNDINGS = ["nearest", "stochastic", "stochastic:16", "stochastic_fast", "stochastic_fastest:4"]


def decoded(operand):
    """values · outer, as the epilogue of a product applies it."""
    values, outer = operand
    assert outer.shape == () and outer.dtype == torch.float32
    return values.float() * outer


def bits_for(x, rounding):
    if rounding == "nearest":
        return None
    width = int(rounding.partition(":")[2] or 8)
    return torch.randint(0, 1 << width, x.shape, dtype=torch.int32)


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_to_fake_quantize(name):
    """Bit for bit: every rounding, either axis, whole blocks and broken ones, any input dtype."""
    for shape, axis, rounding in itertools.product([(64, 96), (50, 70), (3, 1)], (0, 1), ROUNDINGS):
        x = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).unsqueeze(1)
        bits = bits_for(x, rounding)
        dtype = exact_dtype(name)
        values, outer = ops.quantize_operand(x, name, axis, rounding, bits, dtype=dtype)
        assert values.dtype == dtype and values.shape == x.shape and values.is_contiguous()
        expected = fake_quantize(x, name, axis, rounding, bits=bits)
        assert torch.equal(decoded((values, outer)), expected)
        wide = quantize_operand(x, name, axis, rounding, bits, dtype=torch.float32)
        assert torch.equal(decoded(wide), expected)
    narrow = torch.randn(40, 48).bfloat16()
    made = quantize_operand(narrow, name, 1, dtype=exact_dtype(name))
    assert torch.equal(decoded(made), fake_quantize(narrow.float(), name, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_exact_dtype_holds_every_code_times_every_scale(name):
    """And no narrower one does: bfloat16 fails on some product where float32 is the answer."""
    fmt = parse(name)
    values = torch.tensor([fmt.element.decode(code) for code in fmt.element.codes]).double()
    values = values[(values >= fmt.element.min) & (values <= fmt.element.max)]
    scales = torch.ones(1).double()
    if fmt.granularity.kind != "tensor":
        if fmt.scale.bits <= 8:
            scales = torch.tensor([fmt.scale.decode(code) for code in fmt.scale.codes]).double()
        else:
            scales = torch.randn(512).abs().to(fmt.scale.storage).double()
        if fmt.rule in ("pow2", "floor", "rceil", "even", "rms"):
            scales = torch.exp2(scales[scales > 0].log2().floor())
        scales = scales[(scales > 0) & (scales <= fmt.scale_bound)]
    products = values.unsqueeze(1) * scales
    products = products[products.abs() >= 2.0**-126]
    exact = exact_dtype(name)
    held = products.bfloat16().double() == products
    assert bool(held.all()) == (exact == torch.bfloat16)


def test_significand_bits_of_every_element():
    for item in ELEMENTS.values():
        if item.bits > 8:
            continue
        odd = [abs(item.decode(code)) for code in item.codes]
        integers = [math.frexp(value)[0] * 2**53 for value in odd if math.isfinite(value) and value]
        widths = [(int(i) // (int(i) & -int(i))).bit_length() for i in integers]
        if item.name in ("int8", "int4", "int3", "int2", "mxint8"):
            widths = [w for w in widths if w <= item.high.bit_length()]  # -2^n is not used
        assert significand_bits(item) == max(widths), item.name


def transformer_engine(x, amax, headroom=1.0, prescale=1.0):
    """TransformerEngine's chain on rows of whole blocks, in float32, by its formulas: (elements
    before rounding, block scales, amax/2688)."""
    f32 = np.float32
    blocks = x.reshape(x.shape[0], -1, 16)
    largest = np.abs(blocks).max(-1, keepdims=True) * f32(headroom)
    s = min(f32(2688) / amax, np.finfo(f32).max)
    scale = largest * (s * f32(1 / 6))
    scale = torch.from_numpy(np.minimum(scale, f32(448))).to(torch.float8_e4m3fn).float().numpy()
    encode = np.minimum(f32(1) / (scale * (f32(1) / s)), np.finfo(f32).max)
    return blocks * encode * f32(prescale), scale, amax / f32(2688)


def nearest_e2m1(units):
    """To nearest, ties to the even code, saturated."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
    size = np.abs(units.astype(np.float64)).clip(max=6)[..., None]
    distance = np.abs(size - grid)
    tied = distance == distance.min(-1, keepdims=True)
    even = tied & (np.arange(8) % 2 == 0)
    index = np.where(even.any(-1), even.argmax(-1), tied.argmax(-1))
    return np.copysign(grid[index], units).astype(np.float32)


@pytest.mark.parametrize("options", [
    {}, dict(headroom=17 / 16), dict(prescale=0.75), dict(tensor_amax=2.0),
    dict(tensor_amax=20.0, headroom=17 / 16, prescale=0.75),
])
def test_nvfp4_by_its_formulas(options):
    x = torch.randn(32, 64) * 3
    amax = np.float32(options.get("tensor_amax", float(x.abs().max())))
    headroom = np.float32(options.get("headroom", 1.0))
    units, scale, outer = transformer_engine(x.numpy(), amax * headroom, headroom,
                                             options.get("prescale", 1.0))
    expected = (nearest_e2m1(units) * scale).reshape(32, 64)
    given = {key: torch.tensor(value) if key == "tensor_amax" else value
             for key, value in options.items()}
    for values, found in (quantize_operand(x, "nvfp4", 1, **given),
                          quantize_operand(x.t().contiguous(), "nvfp4", 0, **given)):
        values = values if values.shape == (32, 64) else values.t()
        assert torch.equal(values.float(), torch.from_numpy(expected))
        assert float(found) == outer


def test_headroom_leaves_no_nvfp4_value_beyond_the_largest():
    """E4M3 rounds a scale down by up to 1/17: data reach 6·17/16, and saturate."""
    x = torch.randn(512, 512).numpy()
    for headroom, most in ((1.0, 6 * 17 / 16), (17 / 16, 6.0)):
        amax = np.abs(x).max() * np.float32(headroom)
        units, _, _ = transformer_engine(x, amax, headroom)
        assert np.abs(units).max() == pytest.approx(most, rel=0.02)
        assert np.abs(units).max() <= most * (1 + 1e-6)


MX = {"mxfp8": (8, 448, ml_dtypes.float8_e4m3fn), "mxfp8_e5m2": (15, 57344, ml_dtypes.float8_e5m2),
      "mxfp6": (2, 7.5, ml_dtypes.float6_e2m3fn), "mxfp6_e3m2": (4, 28, ml_dtypes.float6_e3m2fn),
      "mxfp4": (2, 6, ml_dtypes.float4_e2m1fn)}


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("name", list(MX))
def test_mx_by_its_formulas(name, rule):
    """OCP MX 1.0: 2^(⌊log2 amax⌋ - emax); NVIDIA: 2^⌈log2(amax/max)⌉; ml_dtypes rounds elements."""
    emax, largest, dtype = MX[name]
    x = torch.randn(64, 96) * torch.logspace(-20, 20, 64).unsqueeze(1)
    blocks = x.numpy().reshape(64, 3, 32)
    amax = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    mantissa, exponent = np.frexp(amax / largest)  # ⌈log2⌉: one less where it is a power of two
    exponent = np.frexp(amax)[1] - 1 - emax if rule == "floor" else exponent - (mantissa == 0.5)
    scale = np.ldexp(np.float32(1), exponent)
    rounded = np.clip(blocks / scale, -largest, largest).astype(dtype).astype(np.float32)
    values, outer = quantize_operand(x, f"{name}:{rule}", 1)
    assert torch.equal(values.float(), torch.from_numpy((rounded * scale).reshape(64, 96)))
    assert float(outer) == 1.0


@pytest.mark.parametrize("prescale", [1.0, 0.75])
def test_prescaled_mxfp4_by_its_formulas(prescale):
    x = torch.randn(16, 64)
    blocks = x.double().numpy().reshape(16, 2, 32)
    exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True))[1] - 1 - 2
    expected = nearest_e2m1(blocks * 2.0**-exponent * prescale) * 2.0**exponent
    values, outer = quantize_operand(x, "mxfp4", 1, prescale=prescale)
    assert torch.equal(values.double(), torch.from_numpy(expected.reshape(16, 64)))
    assert float(outer) == 1.0
    if prescale == 0.75:  # 8·3/4 = 6: nothing saturates
        assert (blocks * 2.0**-exponent * prescale).max() <= 6


def test_a_given_amax_is_the_scale_of_the_whole_tensor():
    x = torch.randn(8, 32) * 10
    for name in ("fp8", "int8", "fp8_e5m2", "log2"):
        amax = torch.tensor(4.0)
        values, outer = quantize_operand(x, name, 1, tensor_amax=amax)
        largest = parse(name).element.max
        assert float(outer) == np.float32(4.0) / np.float32(largest)
        assert torch.equal(decoded((values, outer)),
                           fake_quantize(x, name, 1, scales=[amax / largest]))
        assert values.abs().max() == largest  # beyond 4: saturated
        _, wider = quantize_operand(x, name, 1, tensor_amax=amax, headroom=2.0)
        assert float(wider) == float(outer) * 2
    zero = quantize_operand(x, "fp8", 1, tensor_amax=torch.tensor(0.0))
    assert float(zero[1]) == 1.0


def test_ue5m3_scales_have_room_above_a_held_amax():
    """They aim at 448 of 61440: data that grew 128-fold since is rounded as it would have been
    (Graphcore, 2026); E4M3 ends at 448."""
    x = torch.randn(32, 64)
    at_first = x.abs().max()
    for name in ("fp4_ue5m3", "e2m1[16x16]*ue5m3*f32"):
        before, outer = quantize_operand(x, name, 1, tensor_amax=at_first)
        after, same = quantize_operand(x * 128, name, 1, tensor_amax=at_first)
        assert torch.equal(after.float(), before.float() * 128) and outer == same
        assert outer == at_first / 2688
    values, _ = quantize_operand(x * 128, "nvfp4", 1, tensor_amax=at_first)
    assert values.abs().max() == 448 * 6


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "nvfp4_2d", "fp8_e5m2"])
def test_what_is_not_finite_is_seen_under_a_given_amax(name):
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(16, 32)
        x[3, 5] = bad
        values, _ = quantize_operand(x, name, 1, tensor_amax=torch.tensor(4.0))
        assert values[3, 5].isnan()
        assert values[:, 16:].isfinite().all()
        current, outer = quantize_operand(x, name, 1)
        assert (current.float() * outer).isnan().any()


def test_16x16_tiles_are_transpose_consistent():
    x = torch.randn(48, 80)
    for name in ("nvfp4_2d", "e2m1[32x32]*e8m0", "e4m3[128x128]*f32"):
        dtype = exact_dtype(name)
        values, outer = quantize_operand(x, name, 1, dtype=dtype)
        turned, same = quantize_operand(x.t(), name, 1, dtype=dtype)
        across, third = quantize_operand(x, name, 0, dtype=dtype)
        assert torch.equal(values, turned.t()) and torch.equal(values, across)
        assert outer == same == third
    values, _ = quantize_operand(x, "nvfp4", 1)
    assert not torch.equal(values, quantize_operand(x.t(), "nvfp4", 1)[0].t())


def eden_of_formulas(x, bits, group, width, headroom):
    """EDEN's definition: values, outer and c, on rows of whole groups; c in float64."""
    amax = np.abs(x).max() * np.float32(headroom) * np.float32(1.75)  # 448/256: aims at 256
    units, scale, outer = transformer_engine(x, amax, headroom)
    rounded = nearest_e2m1(units)
    restored = (rounded * scale * outer).astype(np.float64).reshape(x.shape[0], -1, group)
    wide = x.astype(np.float64).reshape(restored.shape)
    share = (wide * wide).sum(-1) / (wide * restored).sum(-1)
    exact = scale[..., 0] * np.repeat(share, group // 16, -1).astype(np.float32)
    step = 2.0 ** (np.maximum(np.floor(np.log2(exact)), -6) - 3)
    below = np.floor(exact / step)
    up = np.round((exact / step - below) * 2**width) + bits >= 2**width
    chosen = np.minimum((below + up) * step, 448)
    return (rounded * chosen[..., None]).reshape(x.shape), outer, share


def test_eden_by_its_formulas():
    x, bits = torch.randn(8, 256), torch.randint(0, 1 << 16, (8, 16), dtype=torch.int32)
    for group, headroom in ((128, 17 / 16 * 0.93), (32, 1.0)):
        expected, outer, _ = eden_of_formulas(x.numpy(), bits.numpy(), group, 16, headroom)
        values, found = ops.eden_operand(x, "nvfp4", 1, bits, group, headroom=headroom)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.double(), torch.from_numpy(expected).double())
        assert float(found) == outer
        turned, _ = ops.eden_operand(x.t(), "nvfp4", 0, bits.t(), group, headroom=headroom)
        assert torch.equal(turned, values.t())
        each = bits.repeat_interleave(16, 1)  # one number an element: the first of a block counts
        assert torch.equal(ops.eden_operand(x, "nvfp4", 1, each, group, headroom=headroom)[0],
                           values)


def test_eden_of_broken_groups_is_that_of_zeros_appended():
    x, bits = torch.randn(3, 200), torch.randint(0, 1 << 16, (3, 16), dtype=torch.int32)
    whole, _ = eden_operand(torch.nn.functional.pad(x, (0, 56)), "nvfp4", 1, bits)
    assert torch.equal(eden_operand(x, "nvfp4", 1, bits[:, :13])[0], whole[:, :200])
    zero, outer = eden_operand(torch.zeros(3, 200), "nvfp4", 1, bits[:, :13])
    assert not zero.any() and outer == 1.0


@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (1, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_empty_and_tiny(shape, axis):
    x, bits = torch.randn(shape), torch.zeros(shape, dtype=torch.int32)
    for values, outer in (ops.quantize_operand(x, "nvfp4", axis), ops.quantize_operand(x, "fp8", 0),
                          ops.eden_operand(x, "nvfp4", axis, bits)):
        assert values.shape == x.shape and outer.isfinite()


def test_eden_keeps_the_length_along_the_data():
    """⟨x, E[x̂]⟩ = ⟨x, x⟩ in each group, over all random numbers of the scales' rounding."""
    x = torch.randn(2, 128)
    total = torch.zeros(2, 128, dtype=torch.float64)
    for bits in range(256):
        values, outer = eden_operand(x, "nvfp4", 1, torch.full((2, 8), bits), 128,
                                     rounding="stochastic:8")
        total += values.double() * outer.double()
    mean = total / 256
    ratio = (x.double() * mean).sum(-1) / x.double().square().sum(-1)
    # c·scale is rounded to 8 bits of odds: each block is off by at most 2^-9 of a step of 2^-3
    assert (ratio - 1).abs().max() < 2.0**-12
    rounded = quantize_operand(x, "nvfp4", 1)
    plain = (x.double() * decoded(rounded).double()).sum(-1) / x.double().square().sum(-1)
    assert (plain - 1).abs().max() > 2.0**-12


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8", "nvfp4_2d"])
def test_opcheck(name):
    x = torch.randn(20, 48)
    amax = None if name == "mxfp8" else torch.tensor(3.0)
    bits = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    opcheck(ops.quantize_operand, (x, name, 1))
    opcheck(ops.quantize_operand, (x, name, 0, "stochastic", bits, amax, 0.75, 17 / 16))
    if name == "nvfp4":
        opcheck(ops.eden_operand, (x, name, 0, torch.randint(0, 1 << 16, (2, 48)), 32))


@pytest.mark.parametrize("axis", [0, 1])
def test_implementations_trace_with_symbolic_sizes(axis):
    def operands(x, bits, amax):
        return (quantize_operand(x, "nvfp4", axis, "stochastic", bits, amax, 0.75),
                quantize_operand(x, "mxfp8", axis), quantize_operand(x, "nvfp4_2d", axis),
                eden_operand(x, "nvfp4", axis, bits.to(torch.int32) * 256, 64))

    def inputs(*shape):
        return torch.randn(shape), torch.randint(0, 256, shape), torch.tensor(2.0)

    graph = make_fx(operands, tracing_mode="symbolic")(*inputs(33, 70))
    for arguments in (inputs(48, 64), inputs(50, 90)):
        for traced, eager in zip(graph(*arguments), operands(*arguments), strict=True):
            assert torch.equal(traced[0], eager[0]) and torch.equal(traced[1], eager[1])


@pytest.mark.parametrize("shape, made", [
    ((50, 70), [("mxfp4", 0), ("nvfp4_2d", 0), ("fp8", 0)]),
    ((64, 96), [("nvfp4", 1), ("nvfp4_2d", 0), ("mxfp4:rms", 1), ("eden", 1)]),
])
def test_compiles_without_fallbacks_to_the_same_values(shape, made):
    """Broken blocks, and whole ones, which are joined by another view of their memory."""
    torch._dynamo.reset()
    x = torch.randn(shape)
    bits = torch.randint(0, 256, shape, dtype=torch.int32)

    def operand(x, bits, name, axis):
        if name == "eden":
            return eden_operand(x, "nvfp4", axis, bits, 32, rounding="stochastic:8")
        if name in ("mxfp4", "nvfp4"):
            return quantize_operand(x, name, axis, "stochastic", bits, prescale=0.75)
        return quantize_operand(x, name, axis)

    def operands(x, bits):
        return [operand(x, bits, name, axis) for name, axis in made]

    found, (code,) = run_and_get_code(torch.compile(operands, fullgraph=True), x, bits)
    assert not re.search(r"extern_kernels\.|torch\.ops\.aten\.\w", code)
    for compiled, eager in zip(found, operands(x, bits), strict=True):
        assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])


BITS = torch.zeros(4, 64, dtype=torch.int32)


@pytest.mark.parametrize("call, message", [
    (lambda x: ops.quantize_operand(x, "mxfp5", 1), "did you mean mxfp"),
    (lambda x: ops.quantize_operand(x.int(), "mxfp4", 1), "convert to float32"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 2), "axis 2 is out of range"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, "up"), "unknown rounding"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, "stochastic"), "needs bits"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, "nearest", BITS), "rounding is 'nearest'"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, "stochastic", BITS + 256), "stochastic:9"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, tensor_amax=torch.tensor(1.0)),
     "finds no scale by the amax of the whole tensor"),
    (lambda x: ops.quantize_operand(x, "fp8", 1, tensor_amax=torch.ones(1)), "pass a scalar"),
    (lambda x: ops.quantize_operand(x, "int8+zp", 1), "drop '\\+zp'"),
    (lambda x: ops.quantize_operand(x, "e4m3[row]*f32", 1), "rounded in torch.bfloat16: use torch."
     "float32"),
    (lambda x: ops.quantize_operand(x, "mxfp4", 1, dtype=torch.float16), "torch.bfloat16 or torch"),
    (lambda x: ops.eden_operand(x, "mxfp4", 1, BITS), "use nvfp4"),
    (lambda x: ops.eden_operand(x, "nvfp4_2d", 1, BITS), "use nvfp4"),
    (lambda x: ops.eden_operand(x, "nvfp4:mse", 1, BITS), "use nvfp4"),
    (lambda x: ops.eden_operand(x, "nvfp4", 1, BITS, 40), "not whole blocks of 16"),
    (lambda x: ops.eden_operand(x, "nvfp4", 1, BITS[:, :5]), "one number a block, 4×4"),
    (lambda x: ops.eden_operand(x, "nvfp4", 1, BITS.float()), "pass integers"),
    (lambda x: ops.eden_operand(x, "nvfp4", 1, BITS + (1 << 16)), "stochastic:17"),
    (lambda x: ops.eden_operand(x, "nvfp4", 1, BITS, rounding="nearest"), "stochastically"),
    (lambda x: ops.eden_operand(x.int(), "nvfp4", 1, BITS), "convert to float32"),
    (lambda x: exact_dtype("int4+zp"), "zero points"),
    (lambda x: exact_dtype("mxfp5"), "did you mean"),
])
def test_bad_inputs(call, message):
    with pytest.raises(FormatError, match=message):
        call(torch.randn(4, 64))
