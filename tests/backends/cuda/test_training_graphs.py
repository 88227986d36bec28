"""Training graphs whose products read stored operands give what decoded operands give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaleprop.backends import quantized
from scaleprop.backends.cuda import operators, scaled, training
from scaleprop.recipes.training import Operand, TrainingRecipe

HOPPER, BLACKWELL = (9, 0), (10, 0)


ROWS = TrainingRecipe(name="rows", description="", operands={
    f"{role}.{kind}": Operand(format="e4m3[row]*f32")
    for role, kinds in (("fprop", "xw"), ("dgrad", ("dy", "w")), ("wgrad", ("dy", "x")))
    for kind in kinds})  # fmt: skip


def step(recipe: str | TrainingRecipe) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(),
                          nn.Linear(32, 16))
    x = torch.randn(32, 96, requires_grad=True)
    compiled: Any = torch.compile(model, backend="scaleprop",
                                  options={"recipe": recipe, "inner": "eager"})
    loss = compiled(x).square().mean()
    loss.backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("recipe", ["fp8-current", "fp8-block", ROWS],
                         ids=["current", "block", "rows"])
def test_a_step_with_stored_float8(recipe, library, monkeypatch):
    loss, gradients = step(recipe)
    counts: list[int] = []

    reads: list[Any] = []

    def keep(joint: torch.fx.GraphModule, device: torch.device) -> None:
        counts.append(training.keep_stored(joint, HOPPER))
        reads.extend(joint.graph.find_nodes(op="call_function",
                                            target=torch.ops.scaleprop_cuda.quantize_both.default))

    monkeypatch.setattr(quantized, "_keep_stored", keep)
    if library:
        monkeypatch.setattr(operators, "capability_of", lambda device: HOPPER)
    ours, found = step(recipe)
    assert sum(counts) == 6  # two layers, three products each; the last layer stays high
    assert bool(reads) == (recipe == "fp8-block")  # of one scale for all, codes are transposed
    assert (ours - loss).abs() <= 2.0**-14 * loss
    for got, want in zip(found, gradients, strict=True):
        # gradients are quantized themselves: one on a boundary may take the other code
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)
        assert cosine > 1 - 2.0**-14 and (got.norm() / want.norm() - 1).abs() < 2.0**-10


@pytest.mark.parametrize(("recipe", "capability"), [
    ("mxfp8", HOPPER), ("fp8-current", (8, 0)), ("fp8-delayed", HOPPER)])  # fmt: skip
def test_what_the_device_has_no_units_for_stays_decoded(recipe, capability, monkeypatch):
    counts: list[int] = []
    monkeypatch.setattr(quantized, "_keep_stored", lambda joint, device: counts.append(
        training.keep_stored(joint, capability)))
    step(recipe)
    assert counts and sum(counts) == 0


def test_block_scales_are_kept_where_there_are_units_for_them(monkeypatch):
    loss, _ = step("mxfp8")
    counts: list[int] = []
    monkeypatch.setattr(quantized, "_keep_stored", lambda joint, device: counts.append(
        training.keep_stored(joint, BLACKWELL)))
    ours, _ = step("mxfp8")
    assert sum(counts) == 6
    assert (ours - loss).abs() <= 2.0**-14 * loss


FOUR = Operand(format="mxfp4:rceil")
MIXED = TrainingRecipe(name="mixed", description="", operands={
    "fprop.x": FOUR, "fprop.w": FOUR, "dgrad.dy": Operand(format="mxfp8_e5m2"), "dgrad.w": FOUR,
    "wgrad.dy": Operand(format="mxfp8_e5m2"), "wgrad.x": FOUR})  # fmt: skip


@pytest.mark.parametrize(("recipe", "elsewhere"), [("mxfp4-tetrajet", 6), (MIXED, 2)],
                         ids=["tetrajet", "mixed"])
def test_blocks_of_four_bits_are_kept_where_there_are_units_for_them(recipe, elsewhere,
                                                                     monkeypatch):
    loss, gradients = step(recipe)
    capability, counts, ran = BLACKWELL, [], []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        ran.append(args)
        return multiply(*args, **kwargs)

    multiply = scaled.multiply
    monkeypatch.setattr(quantized, "_keep_stored", lambda joint, device: counts.append(
        training.keep_stored(joint, capability)))
    monkeypatch.setattr(operators, "capability_of", lambda device: capability)
    monkeypatch.setattr(scaled, "multiply", noted)
    ours, found = step(recipe)
    assert sum(counts) == len(ran) == 6
    assert (ours - loss).abs() <= 2.0**-14 * loss
    for got, want in zip(found, gradients, strict=True):
        # as of float8; of four bits the other code is further away
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)
        assert cosine > 1 - 2.0**-14
    capability = (12, 0)
    counts.clear()
    step(recipe)
    assert sum(counts) == elsewhere
