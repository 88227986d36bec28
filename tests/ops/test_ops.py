"""The operators ``scaleprop::*``: schema, fake kernels, gradients, meaning, tracing, bad inputs."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import scaleprop.formats as formats
from scaleprop import ops
from scaleprop.errors import FormatError
from scaleprop.ops import implementations

FORMATS = ["mxfp8", "mxfp6", "mxfp4", "nvfp4", "int8", "int8+zp", "fp8", "int4[1x32]*f16+zp",
           "e2m1[16x16]*e4m3*f32", "int8[row]*f32", "e4m3[1x32]*ue5m3", "nf4"]
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check(op, arguments):
    """opcheck; its schema test cannot compare float8 inputs, so those are compared here."""
    tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a])
               if isinstance(t, torch.Tensor)]
    small = any(t.dtype.itemsize == 1 and t.dtype.is_floating_point for t in tensors)
    before = [t.detach().clone() for t in tensors]
    opcheck(op, arguments, test_utils=CHECKS if small else (*CHECKS, "test_schema"))
    op(*arguments)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(raw(old), raw(new.detach()))


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


OPCHECKED = ["mxfp8", "mxfp4", "nvfp4", "int8", "int8+zp", "fp8", "e2m1[16x16]*e4m3*f32"]


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name):
    x, w, bias = torch.randn(3, 5, 64), torch.randn(24, 64), torch.randn(24)
    check(ops.quantize, (x, name))
    check(ops.fake_quantize, (x.clone().requires_grad_(), name))
    parts = ops.quantize(x, name)
    check(ops.dequantize, (parts, name, [3, 5, 64]))
    check(ops.scaled_mm, (parts, ops.quantize(w, name), bias, name, name, 64))
    plain = x.clone().requires_grad_()
    check(ops.scaled_mm, ([plain], ops.quantize(w, name), bias.requires_grad_(), "f32", name, 64))


def test_opcheck_of_the_other_arguments():
    x = torch.randn(8, 64, requires_grad=True)
    bits = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    check(ops.quantize, (x, "mxfp8", 0))
    check(ops.quantize, (x, "mxfp4", -1, "stochastic", bits))
    check(ops.fake_quantize, (x, "nvfp4", 0, "stochastic", bits))
    check(ops.fake_quantize, (x, "int8", -1, "nearest", None, [torch.tensor(0.1)]))
    zero_point = torch.tensor(3, dtype=torch.uint8)
    check(ops.quantize, (x, "int8+zp", -1, "nearest", None, [torch.tensor(0.1), zero_point]))
    check(ops.dequantize, (ops.quantize(x, "mxfp4", 0), "mxfp4", [8, 64], 0, torch.bfloat16))
    check(ops.hadamard, (x, 16))
    check(ops.hadamard, (x, 4, torch.tensor([1.0, -1, -1, 1]), 0))
    check(ops.hadamard, (x, 32, torch.ones(64)))


@pytest.mark.parametrize("name", FORMATS)
def test_ops_are_the_functions_of_formats(name):
    x = torch.randn(6, 33, 70)
    for axis in (-1, 0, 1):
        scaled = formats.quantize(x, name, axis=axis)
        parts = ops.quantize(x, name, axis)
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(parts, scaled.parts, strict=True))
        got = ops.dequantize(parts, name, list(x.shape), axis)
        assert torch.equal(got, scaled.dequantize())
        assert torch.equal(ops.fake_quantize(x, name, axis), got)


@pytest.mark.parametrize("name", FORMATS)
def test_fake_kernels_with_symbolic_sizes(name):
    x = torch.randn(6, 64)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(x)
    with mode:
        rows = fake.shape[0]
        parts = ops.quantize(fake, name)
        y = ops.scaled_mm(parts, parts, None, name, name, fake.shape[1])
        back = ops.dequantize(parts, name, [rows, 64])
    assert isinstance(rows, torch.SymInt) and y.dtype == torch.float32
    assert back.shape[0] == rows and y.shape == (6, 6)
    for made, real in zip(parts, ops.quantize(x, name), strict=True):
        assert made.dtype == real.dtype and tuple(made.shape) == tuple(real.shape)


@pytest.mark.parametrize("name", dict.fromkeys(
    [*FORMATS, *formats.named_formats(), "nvfp4:mse", "int4:mse"]))
def test_implementations_trace_with_symbolic_sizes(name):
    """One trace serves other sizes: nothing depends on data or on the number of blocks."""
    x, other = torch.randn(6, 300), torch.randn(9, 517)
    quantize = make_fx(lambda t: implementations.quantize(t, name), tracing_mode="symbolic")(x)
    fake = make_fx(lambda t: implementations.fake_quantize(t, name), tracing_mode="symbolic")(x)
    for a, b in zip(quantize(other), implementations.quantize(other, name), strict=True):
        assert torch.equal(raw(a), raw(b))
    assert torch.equal(fake(other), implementations.fake_quantize(other, name))
    allowed = ("aten.", "<built-in function", "_operator")
    for node in fake.graph.nodes:
        assert node.op != "call_function" or str(node.target).startswith(allowed), node.target


def test_every_operator_has_an_implementation():
    whole = {"IMPLEMENTATIONS", "wide_mm"}  # a product that ATen has no operator for
    assert {name.removeprefix("scaleprop::") for name in ops.IMPLEMENTATIONS} == {
        name for name in ops.__all__ if name not in whole}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8", "int8+zp"])
def test_compiles_with_inductor_to_the_same_bits(name):
    x = torch.randn(16, 96)
    compiled = torch.compile(lambda t: formats.fake_quantize(t, name), fullgraph=True)
    assert torch.equal(compiled(x), formats.fake_quantize(x, name))


@pytest.mark.parametrize(("name", "chunks"), [
    ("mxfp4", 8), ("nvfp4", 8), ("int4+zp", 8), ("int8[row]*f32", 8), ("int8", 1), ("nvfp4_2d", 1),
])
def test_scaled_mm_takes_rows_that_share_no_scale_in_chunks(name, chunks, monkeypatch):
    x, parts = torch.randn(3, 64), ops.quantize(torch.randn(50, 64), name)
    whole = ops.scaled_mm([x], parts, None, "f32", name, 64)
    monkeypatch.setattr(implementations, "_CHUNK", 7 * parts[0].shape[-1])
    assert len(list(implementations._row_chunks(parts, name))) == chunks
    got = ops.scaled_mm([x], parts, None, "f32", name, 64)
    torch.testing.assert_close(got, whole, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("x_name", ["f32", "bf16", "mxfp4", "nvfp4", "int8", "int8+zp"])
@pytest.mark.parametrize("w_name", ["f32", "f16", "mxfp4", "nvfp4", "int4", "int8[row]*f32"])
def test_scaled_mm_is_the_exact_sum_rounded_once(x_name, w_name):
    x, w, bias = torch.randn(2, 5, 50), torch.randn(7, 50), torch.randn(7)

    def operand(tensor, name):
        if name in ("f32", "bf16", "f16"):
            dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]
            return [tensor.to(dtype)], tensor.to(dtype).double()
        scaled = formats.quantize(tensor, name)
        return scaled.parts, scaled.dequantize(torch.float64)

    (x_parts, left), (w_parts, right) = operand(x, x_name), operand(w, w_name)
    got = ops.scaled_mm(x_parts, w_parts, bias, x_name, w_name, 50)
    expected = np.float32(left.numpy() @ right.numpy().T)
    torch.testing.assert_close(got, torch.from_numpy(expected) + bias, rtol=2e-7, atol=0)
    assert got.dtype == torch.float32 and got.shape == (2, 5, 7)
    bare = ops.scaled_mm(x_parts, w_parts, None, x_name, w_name, 50)
    assert torch.equal(bare + bias, got)


def test_scaled_mm_of_block_formats_is_exact_against_fractions():
    from fractions import Fraction
    x, w = torch.randn(3, 40), torch.randn(2, 40)
    a, b = formats.quantize(x, "mxfp4"), formats.quantize(w, "mxfp8")
    got = ops.scaled_mm(a.parts, b.parts, None, "mxfp4", "mxfp8", 40)
    for i, row in enumerate(a.dequantize().tolist()):
        for j, column in enumerate(b.dequantize().tolist()):
            exact = sum(Fraction(p) * Fraction(q) for p, q in zip(row, column, strict=True))
            assert got[i, j].item() == np.float32(float(exact))


def test_scaled_mm_gradients_are_exact():
    x = torch.randn(4, 3, 48, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    w = formats.quantize(torch.randn(8, 48), "mxfp4")
    dy = torch.randn(4, 3, 8)
    ops.scaled_mm([x], w.parts, bias, "f32", "mxfp4", 48).backward(dy)
    assert torch.equal(x.grad, (dy.double() @ w.dequantize(torch.float64)).float())
    assert torch.equal(bias.grad, dy.double().sum((0, 1)).float())
    plain = torch.randn(8, 48, requires_grad=True)
    quantized = formats.quantize(x.detach(), "int8")
    ops.scaled_mm(quantized.parts, [plain], None, "int8", "f32", 48).backward(dy)
    left = quantized.dequantize(torch.float64).reshape(-1, 48)
    assert torch.equal(plain.grad, (dy.double().reshape(-1, 8).t() @ left).float())


def test_scaled_mm_gradcheck():
    w = formats.quantize(torch.randn(3, 16), "mxfp4")
    x = torch.randn(2, 16, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)

    def f(a, b):
        return ops.scaled_mm([a], w.parts, b, "f32", "mxfp4", 16)

    jacobian = torch.autograd.functional.jacobian(f, (x, bias))
    expected = torch.einsum("nk,mp->mnpk", w.dequantize(), torch.eye(2))
    assert torch.equal(jacobian[0], expected)
    assert torch.equal(jacobian[1], torch.eye(3).expand(2, 3, 3))


def test_fake_quantize_gradient_is_straight_through():
    x = torch.randn(4, 64, requires_grad=True)
    dy = torch.randn(4, 64)
    ops.fake_quantize(x, "mxfp4").backward(dy)
    assert torch.equal(x.grad, dy)
    assert not ops.quantize(x, "mxfp4")[0].requires_grad


@pytest.mark.parametrize("call, message", [
    (lambda x: ops.quantize(x, "mxfp5"), "did you mean mxfp"),
    (lambda x: ops.quantize(x.int(), "mxfp4"), "convert to float32"),
    (lambda x: ops.quantize(x, "mxfp4", 2), "axis 2 is out of range"),
    (lambda x: ops.quantize(x, "mxfp4", -1, "stochastic"), "needs bits"),
    (lambda x: ops.quantize(x, "mxfp4", -1, "stochastic", x), "pass integers"),
    (lambda x: ops.fake_quantize(x, "mxfp4", -1, "stochastic", x.int()[:1]), "bits have shape"),
    (lambda x: ops.fake_quantize(x, "mxfp4", -1, "stochastic", x.int() * 0 + 999), "stochastic:10"),
    (lambda x: ops.fake_quantize(x, "int8", -1, "nearest", None, []), "takes scales="),
    (lambda x: ops.dequantize([x], "mxfp4", [4, 64]), "has 2 parts"),
    (lambda x: ops.scaled_mm([x], [x], None, "f32", "f32", 32), "k is 32"),
    (lambda x: ops.scaled_mm([x, x], [x], None, "f32", "f32", 64), "is one float tensor"),
    (lambda x: ops.scaled_mm(ops.quantize(x, "mxfp4"), [x], None, "mxfp4", "f32", 65),
     "last axis"),
    (lambda x: ops.scaled_mm([x], [x.unsqueeze(0)], None, "f32", "f32", 64), r"w is \[n, k\]"),
])
def test_bad_inputs(call, message):
    with pytest.raises(FormatError, match=message):
        call(torch.randn(4, 64))


def test_registering_twice_is_refused():
    from scaleprop.ops.registration import register
    with pytest.raises(FormatError, match="registered already"):
        register()
