"""Attention by training recipe, against products of quantized factors written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.ops.hadamard import hadamard
from scaleprop.ops.operands import quantize_operand
from scaleprop.passes.training.attention import in_products
from scaleprop.recipes.training import Operand, TrainingRecipe

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 10, 32


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        shape = (BATCH, HEADS, TOKENS, WIDTH)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(shape)) for _ in range(3))
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = F.scaled_dot_product_attention(self.q * x, self.k * x, self.v * x, **self.options)
        return (found * x).square().mean()


def recipe(**options: Any) -> TrainingRecipe:
    dy = {**options, "format": options["format"].replace("e4m3", "e5m2")}
    return TrainingRecipe(name="attention", description="", high=(), operands={
        "attention.x": Operand(**options), "attention.dy": Operand(**dy)})


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def by_hand(made: TrainingRecipe, x: torch.Tensor, causal: bool) -> list[torch.Tensor]:
    def q(value: torch.Tensor, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Data and its outer scale, along the last axis."""
        operand = made.operands[role]
        if operand.hadamard:
            value = F.pad(value, (0, -value.shape[-1] % operand.hadamard))
            value = hadamard(value, operand.hadamard)
        flat = value.reshape(-1, value.shape[-1])
        data, outer = quantize_operand(flat, operand.format, 1, dtype=torch.float32)
        return data.reshape(value.shape), outer

    def product(a: torch.Tensor, one: str, b: torch.Tensor, other: str) -> torch.Tensor:
        (left, outer), (right, more) = q(a, one), q(b.mT, other)
        return (left @ right.mT) * (outer * more)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Any, b: Any) -> Any:
            ctx.save_for_backward(a, b)
            return product(a, "attention.x", b, "attention.x")

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            a, b = ctx.saved_tensors
            return (product(dy, "attention.dy", b.mT, "attention.x"),
                    product(a.mT, "attention.x", dy, "attention.dy"))

    torch.manual_seed(0)
    model = Attention()
    scores = Product.apply(model.q * x, (model.k * x).mT) * (1 / math.sqrt(WIDTH))
    if causal:
        scores = scores.masked_fill(~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), -math.inf)
    found = Product.apply(scores.softmax(-1), model.v * x)
    loss = (found * x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [
    {"format": "mxfp8"}, {"format": "nvfp4"}, {"format": "e4m3[tensor]*f32"},
    {"format": "nvfp4", "hadamard": 16}], ids=str)
def test_a_step_is_the_products_written_out(options: dict[str, Any], causal: bool):
    x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    made = recipe(**options)
    torch.manual_seed(0)
    model = scaleprop.prepare_training(Attention(is_causal=causal), made, inner="eager")
    torch.manual_seed(0)
    exact = step(Attention(is_causal=causal), x)
    got, want = step(model, x), by_hand(made, x, causal)
    for a, b, c in zip(got, want, exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() and (b - c).norm() > 1e-3 * c.norm()
    (report,) = model.scale_report()
    assert len(report.quantized) == 12 and not report.high


BOOLEAN = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.5
BOOLEAN[3] = False  # attends to nothing


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": BOOLEAN},
    {"attn_mask": torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))},
    {"attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(~BOOLEAN, -math.inf)},
    {"attn_mask": BOOLEAN.expand(BATCH, 1, TOKENS, TOKENS), "scale": 2.0}], ids=str)
def test_attention_in_products_is_the_fused_one(options: dict[str, Any]):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=draw, dtype=torch.float64)
               .requires_grad_() for _ in range(3))
    options = {name: value.double() if torch.is_tensor(value) and value.is_floating_point()
               else value for name, value in options.items()}
    results = []
    for attend in (in_products, F.scaled_dot_product_attention):
        found = attend(q, k, v, **options)
        results.append([found, *torch.autograd.grad(found.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_grouped_queries_share_their_keys():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, 6, TOKENS, WIDTH, generator=draw)
    k, v = (torch.randn(BATCH, 2, TOKENS, WIDTH, generator=draw) for _ in range(2))
    torch.testing.assert_close(
        in_products(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-5, atol=1e-6)


def test_dropout_drops_weights():
    v = torch.eye(TOKENS).expand(1, 1, TOKENS, TOKENS)
    torch.manual_seed(0)
    found = in_products(torch.zeros(1, 1, 4000, 8), torch.zeros(1, 1, TOKENS, 8), v, dropout_p=0.25)
    kept = found[found > 0]
    assert abs(len(kept) / found.numel() - 0.75) < 0.01
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / TOKENS / 0.75))


class Heads(nn.Module):
    """torch's own layer, which Dynamo leaves whole."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.weights = weights

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found, _ = self.attend(x, x, x, need_weights=self.weights, attn_mask=mask)
        return found.square().mean()


class Linear(nn.Module):
    """No softmax: one product reads another's result, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.all(x).chunk(3, -1)
        scores = query @ key.mT if mask is None else \
            torch.baddbmm(mask.float(), query, key.mT, beta=0.5, alpha=0.25)
        return (scores @ value).square().mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [lambda: Heads(False), lambda: Heads(True), Linear],
                         ids=["heads", "weights", "linear"])
def test_every_product_is_found_with_its_gradients_told(make: Any, masked: bool):
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if masked else None
    torch.manual_seed(0)
    plain = make()
    plain(x, mask).backward()
    torch.manual_seed(0)
    model = scaleprop.prepare_training(make(), recipe(format="e4m3[tensor]*f32"), inner="eager")
    model(x, mask).backward()
    (report,) = model.scale_report()
    assert sorted(each.role for each in report.quantized) == [
        *["attention.dy"] * 4, *["attention.x"] * 8]
    assert not [why for why in report.high.values() if "attention" in why or "batch" in why]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() < 0.2 * b.grad.norm()


def test_parts_of_a_model_round_by_numbers_of_their_own():
    """Graphs are compiled one by one, each with attention that is its first."""
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Linear(), Linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.first(x)
            torch._dynamo.graph_break()
            return torch.stack([first, self.last(x)])

    torch._dynamo.reset()
    model = Parts()
    model.last.load_state_dict(model.first.state_dict())
    scaleprop.prepare_training(model, recipe(format="nvfp4", rounding="stochastic:16"),
                               inner="eager")
    first, last = model(torch.randn(BATCH, TOKENS, WIDTH)).tolist()
    assert first != last
    assert len({each.layer for report in model.scale_report()  # type: ignore[operator]
                for each in report.quantized}) == 2 * len(model.scale_report()[0].quantized)


class Blocks(nn.Module):
    """Attention in two residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList((nn.Linear(WIDTH, 3 * WIDTH),
                                                   nn.Linear(WIDTH, WIDTH))) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for into, out in self.blocks:  # type: ignore[misc]
            query, key, value = into(F.layer_norm(x, [WIDTH])).chunk(3, -1)
            x = x + out(F.scaled_dot_product_attention(query, key, value))
        return self.head(x).square().mean()


@pytest.mark.parametrize("kept", ["first:1", "last:1"])
def test_attention_of_layers_that_are_kept_high_is_high(kept: str):
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    found = {}
    for high in ((), (kept,)):
        torch._dynamo.reset()
        model = scaleprop.prepare_training(Blocks(), recipe(format="nvfp4").replace(high=high),
                                           inner="eager")
        model(x).backward()
        (found[high],) = model.scale_report()
    assert [len(report.quantized) for report in found.values()] == [24, 12]
    why = [why for why in found[kept,].high.values() if "branches" in why]
    # of two linear layers, the first of which needs no gradient of data; and of attention
    assert len(why) == 6 - (kept == "first:1") + 6
