"""Rows and columns quantized in tiles equal the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaleprop.backends.cuda import lines, operators, quantizing
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.rounding import decode
from scaleprop.ops.operands import quantize_operand
from tests.backends.cuda.test_quantize_kernels import DEVICE, ROWS, assert_same, everything, sample

LINES = tuple(name for name in ROWS if not name.endswith("+zp"))
WAYS = ("e4m3[row]*f32", "int4[row]*f32", "e4m3[tensor]*f32")


@pytest.mark.parametrize(("name", "kind"), everything(LINES, WAYS))
def test_both_axes_and_one(name, kind):
    fmt, x = parse(name), sample(kind)
    want = {axis: quantize_parts(x, fmt, axis) for axis in (0, 1)}
    for axes in ((1, 0), (0,)):
        for axis, got in zip(axes, lines.quantize_lines(x, fmt, axes), strict=True):
            assert_same(got, want[axis])


@pytest.mark.parametrize("name", ["e2m3[row]*f32", *WAYS])
@pytest.mark.parametrize("turned", [False, True])
def test_many_tiles_of_any_strides(name, turned):
    x = torch.randn(261, 283, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = (x * torch.logspace(-4, 4, 283, device=DEVICE))[::2, ::2]
    x = x.t() if turned else x
    found = lines.quantize_lines(x, parse(name), (0, 1))
    for axis, got in enumerate(found):
        assert_same(got, quantize_parts(x, parse(name), axis))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 70), (70, 1), (5, 6), (6, 7)])
@pytest.mark.parametrize("name", ["e2m3[row]*f32", "int4[row]*f32", "e4m3[tensor]*f32"])
def test_few_lines_or_none(name, shape):
    x = torch.linspace(-3, 5, shape[0] * shape[1], device=DEVICE).reshape(shape)
    for axes in ((0, 1), (0,), (1,)):
        for axis, got in zip(axes, lines.quantize_lines(x, parse(name), axes), strict=True):
            assert_same(got, quantize_parts(x, parse(name), axis))


@pytest.mark.parametrize("axes", [(1, 0), (0,), (1,)])
@pytest.mark.parametrize("name", ["e4m3[tensor]*f32", "e5m2[tensor]*f32",
                                  "e4m3[tensor]*f32:pow2"])
def test_a_given_amax_is_that_of_operands(name, axes):
    x, fmt = sample("bfloat16"), parse(name)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    for number in (0.7, 1e4, 1e-42, 3e38, 0.0, torch.inf, torch.nan):
        amax = torch.tensor(number, device=DEVICE)
        for axis, (data, scale) in zip(axes, lines.quantize_lines(x, fmt, axes, amax),
                                       strict=True):
            values, outer = quantize_operand(x, name, axis, tensor_amax=amax,
                                             dtype=torch.float32)
            assert_same([decode(data, fmt.element), scale],
                        [values if axis else values.t(), outer])
            assert decode(data, fmt.element).isnan().sum() == (3 if number < torch.inf
                                                               else x.numel())


def test_both_ways_of_a_tensor_have_a_scale_each():
    """What an operator returns must not be one tensor twice."""
    (_, scale), (_, other) = lines.quantize_lines(sample("float32"), parse("fp8"), (1, 0))
    assert torch.equal(scale, other) and scale.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(("name", "shape", "amax"), [
    ("mxfp8", (4, 64), None), ("e4m3[row]*f32*f32", (4, 64), None), ("fp8", (2, 4, 64), None),
    ("int8[row]*f32+zp", (4, 64), None), ("e4m3[row]*bf16", (4, 64), None),
    ("ternary", (4, 64), None), ("e4m3[tensor]*f32:mse", (4, 64), 1.0),
    ("e4m3[row]*f32", (4, 64), 1.0), ("int8", (4, 64), 1.0), ("e2m3[tensor]*f32", (4, 64), 1.0),
    ("fp8", (4, 64), [1.0]),
])  # fmt: skip
def test_what_no_kernel_has_is_refused(name, shape, amax):
    given = None if amax is None else torch.tensor(amax)
    with pytest.raises(FormatError, match=r"quantize_lines|kernel|tensor_amax"):
        lines.quantize_lines(torch.zeros(shape), parse(name), (1, 0), given)


@pytest.mark.parametrize("name", ["e4m3[row]*f32", "e4m3[tensor]*f32"])
def test_the_operator_reads_in_the_order_of_memory(name, monkeypatch):
    """The kernel of rows only where rows lie in memory as they are read."""
    read: list[bool] = []

    def spy(x: Tensor, *args: object) -> list[Tensor]:
        read.append(x.is_contiguous())
        return quantizing.quantize_rows(x, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(lines, "quantize_rows", spy)
    x = sample("bfloat16")
    for tensor, axis, by_rows in ((x, -1, True), (x, 0, False), (x.t(), 0, True),
                                  (x.t(), 1, False), (x, -2, False)):
        assert_same(operators.quantize(tensor, name, axis), quantize_parts(tensor, parse(name),
                                                                           axis))
        assert read == [True] * by_rows
        read.clear()
