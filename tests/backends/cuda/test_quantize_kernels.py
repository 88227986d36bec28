"""Quantize kernels equal the reference, bit for bit, under Triton's interpreter or on a device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from scaleprop.backends.cuda import quantizing
from scaleprop.backends.cuda.constants import element_constants
from scaleprop.backends.cuda.kernels import numbers
from scaleprop.errors import FormatError
from scaleprop.formats import parse, random
from scaleprop.formats.elements import ELEMENTS, FloatElement
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.rounding import MODES, Rounding, encode, nearest
from scaleprop.formats.tensor import dequantize_parts
from scaleprop.ops.hadamard import hadamard
from scaleprop.ops.operands import quantize_operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (
    "mxfp8", "mxfp8_e5m2", "mxfp8:rceil", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxfp4:ceil",
    "mxfp4:even", "nvfp4", "nvfp4_2d", "e2m1[1x16]*ue5m3*f32", "e2m1[1x16]*ue5m3",
    "e2m1[1x16]*e8m0*f32", "e4m3[1x128]*f32", "e4m3[128x128]*f32", "e4m3[1x128]*f32:pow2",
    "int8[1x32]*f32", "int8[1x32]*e8m0", "int4[1x128]*f32",
)  # fmt: skip
ROWS = (
    "e4m3[row]*f32", "e2m3[row]*f32", "int8[row]*f32", "int4[row]*f32", "int8[row]*f32+zp",
    "int4[row]*f32+zp", "e4m3[tensor]*f32", "e5m2[tensor]*f32", "e4m3[tensor]*f32:pow2",
    "int8[tensor]*f32", "int8[tensor]*f32+zp",
)  # fmt: skip
INPUTS = ("float32", "bfloat16", "float16", "zeros", "subnormal", "huge", "nan", "inf", "one",
          "empty")  # fmt: skip


def sample(kind: str) -> Tensor:
    """A matrix of no whole number of blocks or tiles."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"one": (1, 1), "empty": (0, 64)}
    x = torch.randn(sizes.get(kind, (37, 200)), generator=generator)
    x = x * torch.logspace(-3, 3, len(x)).unsqueeze(1)
    match kind:
        case "bfloat16" | "float16":
            x = x.to(getattr(torch, kind))
        case "zeros":
            x.zero_()
        case "subnormal":
            x *= 1e-39
        case "huge":  # and in columns
            x = (x * 1e35).t().contiguous().t()
        case "nan" | "inf":
            x[3, 5] = float(kind)
    return x.to(DEVICE)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """The same bytes; of NaN, whose sign says nothing, the same places."""
    for actual, expected in zip(got, want, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        differs = raw(actual) != raw(expected)
        if actual.is_floating_point():
            differs &= ~(actual.float().isnan() & expected.float().isnan())
        assert not differs.any()


def raw(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.uint8)


def everything(names: Sequence[str], all_inputs: Sequence[str]) -> list[tuple[str, str]]:
    """Every format with plain data; those that stand for the others' ways with every input."""
    return [(name, kind) for name in names for kind in INPUTS
            if kind == "float32" or name in all_inputs]


@pytest.mark.parametrize(("name", "kind"), everything(
    BLOCKS, ("mxfp8", "mxfp6", "nvfp4", "e2m1[1x16]*ue5m3", "e4m3[128x128]*f32", "int8[1x32]*e8m0",
             "mxfp4:even")))
def test_blocks_along_both_axes(name, kind):
    fmt, x = parse(name), sample(kind)
    for axis, got in zip((1, 0), quantizing.quantize_groups(x, fmt, (1, 0)), strict=True):
        assert_same(got, quantize_parts(x, fmt, axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_one_axis_alone(axis):
    (got,) = quantizing.quantize_groups(sample("float32"), parse("nvfp4"), (axis,))
    assert_same(got, quantize_parts(sample("float32"), parse("nvfp4"), axis))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "nvfp4", "int8[1x32]*e8m0", "int4[1x128]*f32"])
def test_given_bits_round_as_the_reference_does(name, mode):
    fmt, x, rounding = parse(name), sample("float32"), Rounding(mode, 12)
    bits = torch.randint(0, 1 << 12, x.shape, device=DEVICE, dtype=torch.int32,
                         generator=torch.Generator(DEVICE).manual_seed(1))
    found = quantizing.quantize_groups(x, fmt, (1, 0), rounding, bits)
    for axis, got in zip((1, 0), found, strict=True):
        assert_same(got, quantize_parts(x, fmt, axis, rounding, bits))


@pytest.mark.parametrize("width", [4, 8, 16, 20])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e4m3[128x128]*f32"])
def test_drawn_bits_are_those_of_the_stream(name, width):
    fmt, x, rounding = parse(name), sample("bfloat16"), Rounding("stochastic", width)
    step, streams = torch.tensor([(1 << 33) + 5]), (torch.tensor([7]), torch.tensor([1 << 31]))
    draw = quantizing.Draw(2**32 - 2, *(part.to(DEVICE) for part in (step, *streams)))
    found = quantizing.quantize_groups(x, fmt, (1, 0), rounding, draw)
    for axis, stream, got in zip((1, 0), streams, found, strict=True):
        bits = random.random_bits(x.shape, draw.seed, stream, step, width, device=DEVICE)
        assert_same(got, quantize_parts(x, fmt, axis, rounding, bits))


def test_drawn_bits_of_a_slice():
    fmt, x, rounding = parse("mxfp4"), sample("float32"), Rounding("stochastic", 8)
    step, stream = torch.tensor([3]), torch.tensor([7])
    bits = random.random_bits(x.shape, 1, stream, step, 8, (48, 0))
    where = [part.to(DEVICE) for part in (step, stream, stream)]
    found = quantizing.quantize_groups(x, fmt, (1, 0), rounding, quantizing.Draw(1, *where, 48))
    for axis, got in zip((1, 0), found, strict=True):
        assert_same(got, quantize_parts(x, fmt, axis, rounding, bits.to(DEVICE)))
    with pytest.raises(FormatError, match="row 8"):
        quantizing.quantize_groups(x, fmt, (1,), rounding, quantizing.Draw(1, *where, 8))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_data_prescaled(name):
    fmt, x = parse(name), sample("float32")
    for axis, got in zip((1, 0), quantizing.quantize_groups(x, fmt, (1, 0), prescale=0.75),
                         strict=True):
        matrix = x if axis else x.t()
        values, outer = quantize_operand(x, name, axis, prescale=0.75, dtype=torch.float32)
        want = (values if axis else values.t()) * outer
        assert torch.equal(dequantize_parts(got, fmt, matrix.shape), want)


@pytest.mark.parametrize(("name", "kind"), everything(
    ROWS, ("e4m3[row]*f32", "int4[row]*f32", "int8[row]*f32+zp", "e4m3[tensor]*f32",
           "int8[tensor]*f32+zp")))
def test_rows_and_tensors(name, kind):
    fmt, x = parse(name), sample(kind)
    want = quantize_parts(x, fmt)
    assert_same(quantizing.quantize_rows(x, fmt), want)
    held = [torch.full_like(part, 0.02 if part.dtype == torch.float32 else 3) for part in want[1:]]
    assert_same(quantizing.quantize_rows(x, fmt, held), quantize_parts(x, fmt, scales=held))


@pytest.mark.parametrize("block", [2, 16, 32, 64, 128])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "e4m3[1x128]*f32"])
def test_rotated_whole_numbers_are_those_of_the_reference(name, block):
    generator = torch.Generator().manual_seed(0)  # sums of whole numbers are exact in any order
    x = torch.randint(-9, 10, (128, 256), generator=generator).float().to(DEVICE)
    signs = (torch.randint(0, 2, (block,), generator=generator) * 2.0 - 1).to(DEVICE)
    fmt = parse(name)
    found = quantizing.quantize_groups(x, fmt, (1, 0), rotation=quantizing.Rotation(block, signs))
    for axis, got in zip((1, 0), found, strict=True):
        assert_same(got, quantize_parts(hadamard(x, block, signs, axis), fmt, axis))


def test_rotated_numbers_are_near_the_reference():
    x, fmt = torch.randn(32, 128, device=DEVICE), parse("mxfp8:rceil")
    ((data, scale),) = quantizing.quantize_groups(x, fmt, rotation=quantizing.Rotation(64))
    found = dequantize_parts([data, scale], fmt, x.shape)
    want = hadamard(x, 64)
    assert ((found - want).abs() <= want.abs() * 2.0**-4 + want.abs().amax() * 2.0**-10).all()


def test_rotations_that_no_kernel_has():
    for block, signs in ((12, None), (256, None), (64, torch.ones(3))):
        with pytest.raises(FormatError, match=r"rotates|signs"):
            quantizing.quantize_groups(torch.zeros(4, 768), parse("mxfp8"),
                                       rotation=quantizing.Rotation(block, signs))


@pytest.mark.parametrize("width", [1, 8, 11, 16, 23, 31])
@pytest.mark.parametrize("shape", [(1, 1), (37, 300), (130, 65)])
def test_random_bits(shape, width):
    step, stream = torch.tensor([(1 << 40) + 3]), torch.tensor([(1 << 31) + 9])
    want = random.random_bits(shape, 2**32 - 1, stream, step, width)
    out = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    got = quantizing.random_bits(out, 2**32 - 1, stream.to(DEVICE), step.to(DEVICE), width)
    assert torch.equal(got.cpu(), want)


@triton.jit
def _encode(x, out, E: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    code = numbers.encode(tl.load(x + place), E)
    tl.store(out + place, code)
    tl.store(out + N + place, numbers.as_bits(numbers.decode(code, E)))


@pytest.mark.parametrize("item", [
    item for item in ELEMENTS.values()
    if isinstance(item, FloatElement) and item.has_zero and item.bits <= 8 and item.native is None
], ids=lambda item: item.name)  # fmt: skip
def test_every_code_and_every_boundary(item):
    values = torch.tensor([item.decode(code) for code in item.codes]).sort().values
    values = values[values.isfinite()]
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middle, values.new_tensor([torch.inf, -torch.inf, 1e30, -1e-30])])
    top = near.new_tensor(torch.inf)
    up, down = near.nextafter(top), near.nextafter(-top)
    x = torch.cat([near, up, down])
    size = 1 << (len(x) - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - len(x))).to(DEVICE)
    out = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    _encode[(1,)](x, out, element_constants(item), size)
    want = nearest(x, item)
    assert torch.equal(out[0], encode(want, item).to(torch.int32))
    assert torch.equal(out[1].view(torch.float32), want)


@triton.jit
def _divide(x, scale, out, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, numbers.divided(tl.load(x + place), tl.load(scale + place)))


@pytest.mark.parametrize("exponents", [(-1, 1), (-149, -100), (-70, -50), (90, 119)])
def test_quotients_are_those_of_division(exponents):
    """Of numbers around those that lie between two codes, too."""
    generator = torch.Generator().manual_seed(0)
    count = 1 << 16
    scale = torch.rand(count, generator=generator) + 1.0
    scale *= torch.exp2(torch.randint(*exponents, (count,), generator=generator).float())
    halves = torch.randint(-512, 513, (count,), generator=generator) * 0.5
    near = torch.randint(-3, 4, (count,), generator=generator).float() * 2.0**-24
    anywhere = torch.randn(count, generator=generator) * 100.0
    for target in (halves * (1.0 + near), anywhere):
        x = (target * scale).to(DEVICE)
        out = torch.empty_like(x)
        _divide[(1,)](x, scale.to(DEVICE), out, count, enable_fp_fusion=False)
        want = x / scale.to(DEVICE)
        assert torch.equal(out.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize(("name", "shape"), [
    ("nf4[1x64]*f32", (4, 64)), ("nvfp4:mse", (4, 64)), ("nvfp4:fouroversix", (4, 64)),
    ("int8[row]*f32", (4, 64)), ("mxfp4", (2, 4, 64)), ("int4[1x128]*f32+zp", (4, 128)),
    ("e4m3[row]*f32*f32", (4, 64)), ("e4m3[3x32]*f32", (6, 64)),
])  # fmt: skip
def test_what_no_kernel_has_is_refused(name, shape):
    with pytest.raises(FormatError, match=r"kernel|quantize_groups"):
        quantizing.quantize_groups(torch.zeros(shape), parse(name))
    if name != "int8[row]*f32":
        with pytest.raises(FormatError, match="quantize_rows"):
            quantizing.quantize_rows(torch.zeros(shape), parse(name))
