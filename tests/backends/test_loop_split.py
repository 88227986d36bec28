"""Graphs whose loops TorchInductor asserts that it could split."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.codegen.cpp import CppScheduling

import scaleprop
from scaleprop.backends import loop_split
from scaleprop.recipes.training import Operand, TrainingRecipe

TOKENS, WIDTH = 256, 160  # blocks of 128: two a column, and one and a quarter a row


def step(inner: str) -> list[torch.Tensor]:
    """Gradients of a layer whose output's gradient is quantized along both axes in one loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, WIDTH), nn.SiLU())
    block = Operand(format="e4m3[1x128]*f32")
    recipe = TrainingRecipe(name="both", description="", high=(), operands={
        "dgrad.dy": block, "wgrad.dy": block})
    model = scaleprop.prepare_training(model, recipe, inner=inner)
    model(torch.randn(TOKENS, 8)).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_blocks_along_both_axes_of_a_gradient(monkeypatch: pytest.MonkeyPatch):
    loop_split.install()
    left: list[bool] = []
    in_one_order = loop_split.in_one_order
    monkeypatch.setattr(loop_split, "in_one_order",
                        lambda nodes: left.append(in_one_order(nodes)) or left[-1])
    for got, want in zip(step("inductor"), step("eager"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))
    assert False in left  # otherwise this is a test of nothing, and the module is needed no more


def test_is_installed_once():
    loop_split.install()
    first = CppScheduling.try_loop_split
    loop_split.install()
    assert CppScheduling.try_loop_split is first
