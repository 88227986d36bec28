"""Casts as they are compiled: the reference's bits, also for numbers nobody expects."""

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import scaleprop.backends.inductor  # noqa: F401  registers the decompositions
from scaleprop import ops
from scaleprop.backends.inductor import casts
from scaleprop.ops import implementations

EIGHT_BITS = ("int8[tensor]*f32", "int8[row]*f32", "int8[tensor]*f32+zp", "int8[row]*f32+zp",
              "e4m3[tensor]*f32", "e4m3[row]*f32", "e5m2[row]*f32")


def hard_numbers(finite: bool = False) -> Tensor:
    """[48, 256]: all magnitudes, ties, subnormals, zeros of both signs; NaN and Inf on top."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 256, generator=generator)
    x *= torch.exp2(torch.randint(-140, 127, (48, 1), generator=generator).float())
    x[2] = 0.0
    x[3] = -0.0
    x[4] = torch.arange(-128, 128) / 4
    x[5] = torch.finfo(torch.float32).max
    x[6] = 1e-45
    x[7] = torch.randint(0, 100, (256,), generator=generator).float() * 1e-44
    x[8, ::3] = -0.0
    if finite:
        x[0] = 1.0
        return x[9:] * 0 + torch.randn(39, 256, generator=generator)
    x[0, :40] = torch.nan
    x[1, 7] = -torch.inf
    return x


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal shape, dtype and bits; any NaN equals any other."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    a, e = actual.float(), expected.float()
    both_nan = a.isnan() & e.isnan()
    return bool((both_nan | (a.view(torch.int32) == e.view(torch.int32))).all())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_quantize_has_the_same_parts(name: str, finite: bool, static: bool):
    x = hard_numbers(finite)
    scales = implementations.quantize(x.nan_to_num(0, 1, -1), name)[1:] if static else None
    actual = casts.quantize(x, name, scales=scales)
    expected = implementations.quantize(x, name, scales=scales)
    assert len(actual) == len(expected)
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


def test_quantize_leaves_other_formats_to_the_reference():
    x = hard_numbers()
    actual, expected = casts.quantize(x, "mxfp4", 0), implementations.quantize(x, "mxfp4", 0)
    assert all(torch.equal(a.view(torch.uint8), e.view(torch.uint8))
               for a, e in zip(actual, expected, strict=True))


FAKE = ("mxfp8", "mxfp6", "mxfp4", "mxfp4:rceil", "nvfp4", "e4m3[row]*f32", "int4[1x32]*f16")
CODES = ("int8[tensor]*f32+zp", "int8[row]*f32", "e4m3[row]*f32")


@pytest.fixture(scope="module")
def fused() -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Results for hard and for ordinary numbers, and the generated code."""
    def everything(x: Tensor) -> list[Tensor]:
        results = [ops.fake_quantize(x, name) for name in FAKE]
        for name in CODES:
            results += ops.quantize(x, name)
        return results

    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        compiled = torch.compile(everything, fullgraph=True, dynamic=False)
        results, code = run_and_get_code(compiled, hard_numbers())
    return results, everything(hard_numbers()), code


def test_users_own_compile_fuses_the_operators(fused: tuple[list[Tensor], list[Tensor], list[str]]):
    *_, code = fused
    text = "\n".join(code)
    assert "cpp_fused" in text
    assert "torch.ops" not in text.split("def call", 1)[1]


def test_fused_operators_have_the_reference_s_bits(
    fused: tuple[list[Tensor], list[Tensor], list[str]]
):
    actual, expected, _ = fused
    wrong = [index for index, (a, e) in enumerate(zip(actual, expected, strict=True))
             if not same_bits(a, e)]
    assert wrong == []


def test_gradients_pass_through_a_compiled_cast():
    torch._dynamo.reset()
    x = torch.randn(4, 64, requires_grad=True)
    with config.patch(force_disable_caches=True):
        y = torch.compile(lambda x: ops.fake_quantize(x, "mxfp4") * 3.0, fullgraph=True)(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))
