"""Norms and activations are near those in float64; their codes are the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scaleprop.backends.cuda import fusing
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from tests.backends.cuda.test_quantize_kernels import DEVICE, assert_same

FORMATS = ("mxfp8", "mxfp6", "mxfp4:even", "nvfp4", "e2m1[1x16]*e8m0*f32", "e4m3[1x128]*f32",
           "int8[1x32]*e8m0", "e4m3[row]*f32", "int8[row]*f32", "int4[row]*f32+zp",
           "e5m2[tensor]*f32", "int8[tensor]*f32+zp")  # fmt: skip
FUNCTIONS = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
             "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
             "sigmoid": torch.sigmoid, "tanh": torch.tanh}  # fmt: skip
ULP = 2.0**-23


def made(kind: str, seed: int = 0) -> Tensor:
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-2, 1, 5).unsqueeze(1) + 0.1
    match kind:
        case "bfloat16" | "float16":
            x = x.to(getattr(torch, kind))
        case "columns":
            x = x.t().contiguous().t()
        case "odd":
            x = x[:, :129]
        case "wide":  # more than a program holds at once
            x = x[:2].repeat(1, 11)
        case "nan":
            x[3, 5] = torch.nan
        case "empty":
            x = x[:0]
    return x.to(DEVICE)


KINDS = ("float32", "bfloat16", "float16", "columns", "odd", "wide", "nan", "empty")


def normed(x: Tensor, kind: str, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """In float64."""
    x = x.double()
    x = x - x.mean(1, keepdim=True) if kind == "layer" else x
    y = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    y = y if gain is None else y * gain.double()
    return y if bias is None else y + bias.double()


def empty(x: Tensor) -> Tensor:
    return torch.full(x.shape, torch.nan, dtype=torch.float32, device=DEVICE)


def assert_near(got: Tensor, want: Tensor, bound: Tensor) -> None:
    known = ~want.isnan()
    assert torch.equal(got.isnan(), ~known)
    assert ((got.double() - want).abs() <= bound)[known].all()


@pytest.mark.parametrize(("norm", "name", "kind"), [
    *(("rms", name, "float32") for name in FORMATS),
    *(("layer", name, kind) for name in ("nvfp4", "int4[row]*f32+zp") for kind in KINDS),
])  # fmt: skip
def test_norms(norm, name, kind):
    x, fmt = made(kind), parse(name)
    gain, bias = (torch.randn(x.shape[1], device=DEVICE) for _ in range(2))
    found = empty(x)
    parts = fusing.norm_quantize(x, fmt, norm, gain, bias, 1e-5, result=found)
    want = normed(x, norm, gain, bias, 1e-5)
    spread = (x.double() if norm == "rms" else x.double() - x.double().mean(1, keepdim=True))
    root = (spread.square().mean(1, keepdim=True) + 1e-5).sqrt()
    largest = x.double().abs().amax(1, keepdim=True) / root * gain.abs() + bias.abs()
    assert_near(found, want, 3 * ULP * largest)
    assert_same(parts, quantize_parts(found, fmt))
    assert_same(fusing.norm_quantize(x, fmt, norm, gain, bias, 1e-5), parts)


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "float32") for name in ("mxfp4:even", "int8[row]*f32", "e5m2[tensor]*f32")),
    *((name, kind) for name in ("mxfp8", "nvfp4") for kind in KINDS),
])  # fmt: skip
def test_gated(name, kind):
    gate, up, fmt = made(kind), made(kind, 1), parse(name)
    found = empty(gate)
    parts = fusing.gated_quantize(gate, up, fmt, "silu", result=found)
    want = functional.silu(gate.double()) * up.double()
    assert_near(found, want, 2 * ULP * (gate.double() * up.double()).abs())
    assert_same(parts, quantize_parts(found, fmt))
    assert_same(fusing.gated_quantize(gate, up, fmt, "silu"), parts)


@pytest.mark.parametrize("name", fusing.ACTIVATIONS)
def test_activations(name):
    x = torch.cat([torch.linspace(-30, 30, 3001), torch.logspace(-30, 1, 500),
                   -torch.logspace(-30, 1, 500), torch.tensor([0.0, torch.nan])]).to(DEVICE)[None]
    found, fmt = empty(x), parse("mxfp8")
    parts = fusing.activation_quantize(x, fmt, name, result=found)
    bounded = 1.0 if name == "sigmoid" else x.double().abs()
    assert_near(found, FUNCTIONS[name](x.double()), 2 * ULP * bounded)
    assert_same(parts, quantize_parts(found, fmt))


def test_relu_is_torchs():
    x = torch.tensor([[-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf]]).to(DEVICE)
    found = empty(x)
    fusing.activation_quantize(x, parse("e4m3[row]*f32"), "relu", result=found)
    assert torch.equal(found.view(torch.int32), x.relu().view(torch.int32))


def test_exact_sums_give_torchs_own_norms():
    signs = torch.randint(0, 2, (5, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs = torch.cat([signs, -signs], 1)  # of mean 0, variance 1
    x = signs * torch.tensor([1, 2, 4, 8, 16.0])[:, None] + 5
    gain, bias, found = torch.arange(128.0), torch.arange(128.0) - 3, empty(x)
    fusing.norm_quantize(x.to(DEVICE), parse("mxfp8"), "layer", gain.to(DEVICE), bias.to(DEVICE),
                         0.0, result=found)
    assert torch.equal(found.cpu(), functional.layer_norm(x, (128,), gain, bias, 0.0))
    x = torch.randint(-9, 9, (5, 128), generator=torch.Generator().manual_seed(1)).float()
    fusing.norm_quantize(x.to(DEVICE), parse("mxfp8"), "rms", eps=0.5, result=found)
    assert torch.equal(found.cpu(), functional.rms_norm(x, (128,), None, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8[row]*f32"])
def test_rounded_between(name, dtype):
    x, up, fmt = made("float32").to(dtype), made("float32", 1).to(dtype), parse(name)
    gain = torch.randn(x.shape[1], device=DEVICE).to(dtype)
    found = empty(x)
    fusing.norm_quantize(x, fmt, "rms", gain, result=found)
    assert_same(fusing.norm_quantize(x, fmt, "rms", gain, between=dtype),
                quantize_parts(found.to(dtype), fmt))
    fusing.norm_quantize(x, fmt, "rms", result=found)  # rounded, scaled, rounded
    assert_same(fusing.norm_quantize(x, fmt, "rms", gain, between=dtype, within=dtype),
                quantize_parts(found.to(dtype) * gain, fmt))
    fusing.activation_quantize(x, fmt, "silu", result=found)
    assert_same(fusing.gated_quantize(x, up, fmt, "silu", between=dtype),
                quantize_parts(found.to(dtype) * up, fmt))


def test_a_rows_numbers_do_not_depend_on_other_rows():
    x, fmt = made("wide"), parse("mxfp8")
    whole, alone = empty(x), empty(x[1:2])
    fusing.norm_quantize(x, fmt, "layer", result=whole)
    fusing.norm_quantize(x[1:2], fmt, "layer", result=alone)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("name", ["nvfp4_2d", "e4m3[128x128]*f32", "int4[1x128]*f32+zp", "int3",
                                  "e4m3[1x48]*f32", "int8[channel]*f32", "int8[row]*bf16",
                                  "nf4", "nvfp4:mse"])  # fmt: skip
def test_formats_that_are_refused(name):
    with pytest.raises(FormatError, match="kernel"):
        fusing.activation_quantize(torch.zeros(4, 128), parse(name), "silu")


@pytest.mark.parametrize(("call", "said"), [
    (lambda x, f: fusing.activation_quantize(x, f, "swish"), "no kernel computes 'swish'"),
    (lambda x, f: fusing.activation_quantize(x[None], f, "silu"), "pass \\[M, K\\]"),
    (lambda x, f: fusing.gated_quantize(x, x[:2], f, "silu"), "one shape"),
    (lambda x, f: fusing.norm_quantize(x, f, "group"), "'rms' or 'layer'"),
    (lambda x, f: fusing.norm_quantize(x, f, "rms", x[0, :3]), "gain"),
    (lambda x, f: fusing.norm_quantize(x, f, "rms", between=torch.float64), "between"),
    (lambda x, f: fusing.norm_quantize(x, f, "rms", result=x.double()), "result"),
])  # fmt: skip
def test_arguments_that_are_refused(call, said):
    with pytest.raises(FormatError, match=said):
        call(torch.zeros(4, 64), parse("mxfp8"))
