"""Graphs whose loops TorchInductor would split, and some of them wrongly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.utils import fresh_cache
from torch.compiler import config

import scaleprop
from scaleprop.backends import loop_split
from scaleprop.backends.graphs import Inner
from scaleprop.recipes.training import Operand, TrainingRecipe

TOKENS, WIDTH = 256, 160  # of blocks of 128: two a column, and one and a quarter a row


def step(inner: Inner) -> list[torch.Tensor]:
    """Gradients of layers whose output and its gradient, along both axes, are in blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 8))
    block = Operand(format="e4m3[1x128]*f32")
    recipe = TrainingRecipe(name="blocks", description="", high=(), operands={
        "fprop.x": block, "dgrad.dy": block, "wgrad.dy": block})
    model = scaleprop.prepare_training(model, recipe, inner=inner)
    model(torch.randn(TOKENS, 8)).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_blocks_that_sizes_are_no_multiples_of(monkeypatch: pytest.MonkeyPatch):
    loop_split.install()
    found: list[bool] = []
    can_split = loop_split.can_split
    monkeypatch.setattr(loop_split, "can_split",
                        lambda nodes: found.append(can_split(nodes)) or found[-1])
    for got, want in zip(step("inductor"), step("eager"), strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()
    assert False in found  # otherwise this tests nothing, and the module is needed no more


def both_axes(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """Square data, and their transpose, to the nearest multiples of their blocks' scales."""
    scale = scale.repeat_interleave(16, 1)
    rows = (x / scale).round() * scale
    return [rows, (rows.T / scale).round() * scale]


def test_square_data_and_their_transpose(monkeypatch: pytest.MonkeyPatch):
    loop_split.install()
    torch.manual_seed(0)
    data = torch.randn(64, 64), torch.rand(64, 4) + 0.1
    untagged = config.patch(cache_key_tag="")  # pyright: ignore[reportAttributeAccessIssue]

    def compiled() -> bool:
        torch.compiler.reset()
        found = torch.compile(both_axes, backend="inductor")(*data)
        return all(torch.equal(a, b) for a, b in zip(found, both_axes(*data), strict=True))

    with fresh_cache():
        with monkeypatch.context() as as_in_torch, untagged:
            split = CppScheduling.try_loop_split.__wrapped__  # type: ignore[attr-defined]
            as_in_torch.setattr(CppScheduling, "try_loop_split", split)
            assert not compiled()  # otherwise ``are_in_step`` is needed no more
        assert compiled()  # not the kernel just cached


def test_is_installed_once():
    loop_split.install()
    first, tag = CppScheduling.try_loop_split, config.cache_key_tag
    loop_split.install()
    assert CppScheduling.try_loop_split is first
    assert config.cache_key_tag == tag
