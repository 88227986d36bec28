"""Learned steps against LSQ's formulas in float64, and as modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import scaleprop
from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import fake_quantize
from scaleprop.qat import LearnedStep


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lsq(x: Tensor, step: float, low: float, high: float, count: int,
        g: Tensor) -> tuple[list[float], list[float], float]:
    """(x̂, ∂L/∂x, ∂L/∂step) of integers in low..high, one number at a time, as in the paper."""
    out, grads, total = [], [], 0.0
    for value, gradient in zip(x.tolist(), g.tolist(), strict=True):
        u = value / step
        rounded = round(min(max(u, low), high))
        out.append(rounded * step)
        grads.append(gradient if low < u < high else 0.0)
        total += gradient * (rounded - u if low < u < high else rounded)
    return out, grads, total / math.sqrt(count * high)


@pytest.mark.parametrize(("fmt", "low", "high"), [
    ("int4[tensor]*f32", -7, 7), ("int8[tensor]*f32", -127, 127), ("int2[tensor]*f32+zp", 0, 3),
    ("int4[tensor]*f32+zp", 0, 15)])
def test_values_and_gradients_are_the_papers(fmt: str, low: int, high: int) -> None:
    x = (torch.randn(500, dtype=torch.float64) * 3).requires_grad_()
    g = torch.randn(500, dtype=torch.float64)
    module = LearnedStep(x, fmt)
    with torch.no_grad():
        module.step.fill_(0.6)
    step = float(module.step)
    out, grads, of_step = lsq(x.detach(), step, low, high, 500, g)
    found = module(x)
    found.backward(g)
    assert found.tolist() == pytest.approx(out, rel=1e-12)
    assert x.grad is not None and x.grad.tolist() == grads
    assert module.step.grad is not None
    assert float(module.step.grad) == pytest.approx(of_step, rel=1e-6)


def test_at_the_ends_the_step_and_not_x_is_moved() -> None:
    x = torch.tensor([[-7.0, 7.0, 7.5, 6.75]], requires_grad=True)
    module = LearnedStep(x, "int4[tensor]*f32", count=4)
    with torch.no_grad():
        module.step.fill_(1.0)
    module(x).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 0.0, 1000.0]]
    expected = (-7 + 70 + 700 + 250) / math.sqrt(4 * 7)
    assert float(module.step.grad or 0) == pytest.approx(expected)


@pytest.mark.parametrize("fmt", ["int4[row]*f32", "int4[1x32]*f32", "e2m1[1x16]*f32",
                                 "nf4[1x64]*f32", "int8[channel]*f32", "e4m3[tensor]*f32",
                                 "int4[16x16]*f32"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_forward_is_fake_quantize_with_that_scale(fmt: str, axis: int) -> None:
    x = torch.randn(24, 70)
    module = LearnedStep(x, fmt, axis)
    assert torch.equal(module(x), fake_quantize(x, fmt, axis, scales=[module.scale.detach()]))
    assert torch.equal(module(x), module.quantize(x).dequantize())
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_steps_begin_at_twice_the_mean_size_over_the_root_of_the_largest() -> None:
    x = torch.randn(4, 48)
    x[2] = 0
    module = LearnedStep(x, "int4[row]*f32")
    expected = 2 * x.double().abs().mean(-1, keepdim=True) / math.sqrt(7)
    expected[2] = 1.0
    torch.testing.assert_close(module.step.double(), expected)
    assert module.count == 48
    ragged = LearnedStep(x[:, :40], "int4[1x32]*f32")
    torch.testing.assert_close(ragged.step[0, 1].double(),
                               2 * x[0, 32:40].double().abs().mean() / math.sqrt(7))


def test_learning_finds_the_step_of_least_error() -> None:
    """From 8 times too large, gradient descent on ‖x̂ - x‖² ends where a search over steps does."""
    x = torch.randn(4096)
    module = LearnedStep(x, "int4[tensor]*f32", count=1)
    with torch.no_grad():
        module.step.mul_(8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    error = float((module(x) - x).square().mean())
    searched = min(float((s * (x / s).round().clamp(-7, 7) - x).square().mean())
                   for s in torch.linspace(0.05, 1.5, 300).tolist())
    assert error < 1.05 * searched


def parametrized() -> torch.nn.Linear:
    linear = torch.nn.Linear(32, 8)
    parametrize.register_parametrization(linear, "weight",
                                         LearnedStep(linear.weight, "int4[row]*f32"))
    return linear


def test_as_a_parametrization_it_trains_and_is_saved() -> None:
    linear, x = parametrized(), torch.randn(16, 32)
    assert len(linear.weight.detach()[0].unique()) <= 15
    names = dict(linear.named_parameters())
    assert {"parametrizations.weight.original", "parametrizations.weight.0.step"} <= set(names)
    linear(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())
    with torch.no_grad():
        names["parametrizations.weight.0.step"].mul_(1.3)
    other = parametrized()
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))
    with torch.no_grad():
        linear.weight = torch.ones(8, 32)
    assert torch.equal(linear.parametrizations.weight.original.detach(), torch.ones(8, 32))


def test_compiled_and_exported() -> None:
    linear, x = parametrized(), torch.randn(16, 32)
    expected = linear(x)
    exported = torch.export.export(linear, (x,)).module()
    assert torch.equal(exported(x), expected)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in linear.parameters() if p.grad is not None]
    linear.zero_grad()
    found = torch.compile(linear)(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for found_grad, grad in zip((p.grad for p in linear.parameters()), grads, strict=True):
        torch.testing.assert_close(found_grad, grad, rtol=1e-4, atol=1e-4)


def test_activations_have_a_step_for_all_batches() -> None:
    module = LearnedStep(torch.rand(4, 10), "int4[tensor]*f32+zp", count=10)
    assert module(torch.rand(9, 10)).shape == (9, 10)
    assert module.count == 10 and "count=10" in repr(module)
    assert float(module(torch.tensor([[-1.0]]))) == 0.0


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int4"])
def test_a_step_is_one_float32(fmt: str) -> None:
    with pytest.raises(ConfigError, match="one float32 scale"):
        LearnedStep(torch.randn(4, 32), fmt)


def test_it_is_found_in_the_package() -> None:
    assert scaleprop.qat.LearnedStep is LearnedStep and "qat" in scaleprop.__all__


def test_what_has_no_mean_size_is_refused() -> None:
    for x in (torch.tensor([1.0, math.nan]), torch.zeros(0), torch.ones(3, dtype=torch.int32)):
        with pytest.raises(ConfigError, match="mean size"):
            LearnedStep(x, "int4[tensor]*f32")
    with pytest.raises(ConfigError, match="at least 1"):
        LearnedStep(torch.ones(3), "int4[tensor]*f32", count=0)
    with pytest.raises(FormatError, match="axis"):
        LearnedStep(torch.ones(3), "int4[tensor]*f32", axis=1)
    with pytest.raises(FormatError, match="scale has shape"):
        LearnedStep(torch.ones(3, 4), "int4[row]*f32")(torch.ones(5, 4))
