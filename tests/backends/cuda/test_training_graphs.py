"""Training graphs whose products read stored operands give what decoded operands give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaleprop import ops
from scaleprop.backends import quantized
from scaleprop.backends.cuda import operators, scaled, training
from scaleprop.recipes.training import Operand, TrainingRecipe

HOPPER, BLACKWELL = (9, 0), (10, 0)
QUANTIZE: Any = torch.ops.scaleprop_cuda.quantize_operand.default

ROWS = TrainingRecipe(name="rows", description="", operands={
    f"{role}.{kind}": Operand(format="e4m3[row]*f32")
    for role, kinds in (("fprop", "xw"), ("dgrad", ("dy", "w")), ("wgrad", ("dy", "x")))
    for kind in kinds})  # fmt: skip


def step(recipe: str | TrainingRecipe, sizes: tuple[int, ...],
         dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    tokens, *wide = sizes
    model = nn.Sequential(nn.Linear(wide[0], wide[1]), nn.GELU(), nn.Linear(wide[1], wide[2]),
                          nn.GELU(), nn.Linear(wide[2], 16)).to(dtype)
    x = torch.randn(tokens, wide[0], dtype=dtype, requires_grad=True)
    compiled: Any = torch.compile(model, backend="scaleprop",
                                  options={"recipe": recipe, "inner": "eager"})
    loss = compiled(x).square().mean()
    loss.backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[torch.fx.Graph]]]:
    """Takes a step on a device of this capability, after one of decoded operands, and compares; how
    many products are stored, in which graphs."""

    def compare(recipe: str | TrainingRecipe, capability: tuple[int, int],
                sizes: tuple[int, ...] = (32, 96, 48, 32)) -> tuple[int, list[torch.fx.Graph]]:
        counts: list[int] = []
        graphs: list[torch.fx.Graph] = []
        loss, gradients = step(recipe, sizes)

        def keep(joint: torch.fx.GraphModule, device: torch.device) -> None:
            counts.append(training.keep_stored(joint, capability))
            graphs.append(joint.graph)

        with monkeypatch.context() as patched:
            patched.setattr(quantized, "_keep_stored", keep)
            ours, found = step(recipe, sizes)
        assert (ours - loss).abs() <= 2.0**-14 * loss
        for got, want in zip(found, gradients, strict=True):
            # gradients are quantized themselves: one on a boundary may take the other code
            cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)
            assert cosine > 1 - 2.0**-14 and (got.norm() / want.norm() - 1).abs() < 2.0**-10
        return sum(counts), graphs

    return compare


def calls(graphs: list[torch.fx.Graph], target: Any) -> list[torch.fx.Node]:
    return [node for graph in graphs for node in graph.find_nodes(op="call_function",
                                                                  target=target)]


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("recipe", [
    "fp8-current", "fp8-delayed", "fp8-cscale", "fp8-block", ROWS],
    ids=lambda recipe: getattr(recipe, "name", recipe))
def test_a_step_with_stored_float8(recipe, library, kept, monkeypatch):
    if library:
        monkeypatch.setattr(operators, "capability_of", lambda device: HOPPER)
    count, graphs = kept(recipe, HOPPER)
    assert count == 6  # two layers, three products each; the last layer stays high
    products = calls(graphs, torch.ops.scaleprop_cuda.gemm.default)
    by_tensor = "tensor" in str(products[0].args[2:4]) or "fp8" in products[0].args[2:4]
    assert all(node.args[6] == by_tensor for node in products)  # which take in these scales
    reads = [node.args[2] for node in calls(graphs, QUANTIZE)]
    # x, w and dy of two layers; weights of 128×128 are the same along both axes, yet both are read
    assert len(reads) == 6 and all(sorted(axes) == [0, 1] for axes in reads)


@pytest.mark.parametrize("recipe", ["fp8-current", "nvfp4", ROWS],
                         ids=lambda recipe: getattr(recipe, "name", recipe))
def test_products_round_to_what_is_read(recipe, monkeypatch):
    sizes = (32, 96, 48, 32)
    _, gradients = step(recipe, sizes, torch.bfloat16)
    graphs: list[torch.fx.Graph] = []

    def keep(joint: torch.fx.GraphModule, device: torch.device) -> None:
        training.keep_stored(joint, BLACKWELL)
        graphs.append(joint.graph)

    monkeypatch.setattr(quantized, "_keep_stored", keep)
    _, found = step(recipe, sizes, torch.bfloat16)
    products = calls(graphs, torch.ops.scaleprop_cuda.gemm.default)
    assert len(products) == 6
    assert all(node.args[5:] == (torch.bfloat16, recipe != ROWS) for node in products)
    for got, want in zip(found, gradients, strict=True):
        cosine = torch.nn.functional.cosine_similarity(got.double().flatten(),
                                                       want.double().flatten(), 0)
        assert cosine > 1 - 2.0**-9


@pytest.mark.parametrize("recipe", ["nvfp4", "fp4-all-the-way", "mxfp4-tseng"])
def test_random_numbers_are_drawn_where_data_is_quantized(recipe, kept):
    count, graphs = kept(recipe, BLACKWELL, (64, 128, 64, 64))  # whole blocks to rotate
    assert count == (4 if recipe == "mxfp4-tseng" else 6)  # which leaves fprop as it is
    assert not calls(graphs, ops.random_bits) and not calls(graphs, ops.quantize_operand)
    drawing = [node for node in calls(graphs, QUANTIZE) if "step" in node.kwargs]
    assert drawing and all(len(node.kwargs["streams"]) == len(node.args[2]) for node in drawing)
    rotating = [node for node in calls(graphs, QUANTIZE) if node.kwargs.get("rotation")]
    assert not calls(graphs, ops.rotate) and bool(rotating) == (recipe != "fp4-all-the-way")


def test_what_is_filled_up_before_it_is_rotated_is_rotated_by_torch(kept):
    count, graphs = kept("mxfp4-tseng", BLACKWELL)
    assert count == 4 and calls(graphs, ops.rotate)
    assert not any(node.kwargs.get("rotation") for node in calls(graphs, QUANTIZE))


def test_one_read_draws_for_both_axes(kept):
    drawn = Operand(format="mxfp8", rounding="stochastic:8")
    recipe = TrainingRecipe(name="drawn", description="", operands={
        role: drawn for role in ("dgrad.dy", "wgrad.dy")} | {
        role: Operand(format="mxfp8") for role in ("dgrad.w", "wgrad.x")})
    count, graphs = kept(recipe, BLACKWELL)
    both = [node for node in calls(graphs, QUANTIZE) if len(node.args[2]) == 2]
    assert count == 4 and len(both) == 2
    for node in both:
        first, second = node.kwargs["streams"]
        assert first is not second


@pytest.mark.parametrize(("recipe", "capability"), [
    ("mxfp8", HOPPER), ("fp8-current", (8, 0)), ("ue5m3", BLACKWELL)])  # fmt: skip
def test_what_the_device_has_no_units_for_stays_decoded(recipe, capability, kept):
    count, graphs = kept(recipe, capability)
    assert count == 0 and not calls(graphs, QUANTIZE)


def test_block_scales_are_kept_where_there_are_units_for_them(kept):
    count, _ = kept("mxfp8", BLACKWELL)
    assert count == 6


FOUR = Operand(format="mxfp4:rceil")
MIXED = TrainingRecipe(name="mixed", description="", operands={
    "fprop.x": FOUR, "fprop.w": FOUR, "dgrad.dy": Operand(format="mxfp8_e5m2"), "dgrad.w": FOUR,
    "wgrad.dy": Operand(format="mxfp8_e5m2"), "wgrad.x": FOUR})  # fmt: skip


@pytest.mark.parametrize(("recipe", "elsewhere"), [("mxfp4-tetrajet", 6), (MIXED, 2)],
                         ids=["tetrajet", "mixed"])
def test_blocks_of_four_bits_are_kept_where_there_are_units_for_them(recipe, elsewhere, kept,
                                                                     monkeypatch):
    ran: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        ran.append(args)
        return multiply(*args, **kwargs)

    multiply = scaled.multiply
    monkeypatch.setattr(operators, "capability_of", lambda device: BLACKWELL)
    monkeypatch.setattr(scaled, "multiply", noted)
    count, _ = kept(recipe, BLACKWELL)
    assert count == len(ran) == 6
    assert kept(recipe, (12, 0))[0] == elsewhere
