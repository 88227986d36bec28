"""Sequences of many lengths, checkpointed regions, export and evaluation of a prepared model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import scaleprop

from .joint_graphs import assert_equal, assert_parallel, step

RECIPES = ("fp32", "fp8")
# 1 − cosine, |ratio of lengths − 1|; the least sure are biases of attention, which are small sums
TOLERANCE = {"fp32": (1e-10, 1e-6), "fp8": (1.5e-2, 8e-2)}
LENGTHS = (8, 12, 5, 16, 12, 7)


class Block(nn.Module):
    """Causal attention and a gated feed-forward, both on norms of the stream."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.0)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attend(self.norms[0](x)))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * value))


class Language(nn.Module):
    """One block, and its own loss."""

    def __init__(self, keep: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(32, 20, bias=False)
        self.keep = keep or (lambda block, x: block(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.keep(block, x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.roll(1, 1).flatten())


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: Callable[..., nn.Module] = Language, *given: Any) -> Any:
    torch.manual_seed(0)
    return kind(*given)


def ids(length: int, batch: int = 4) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(length))


def saved(block: nn.Module, x: torch.Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=False)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def follows(model: Any, plain: nn.Module, recipe: str, most: int) -> None:
    """Several lengths, compiled at most so often, and once for a length that was seen."""
    for length in LENGTHS:
        assert_parallel(step(model, ids(length)), step(plain, ids(length)), *TOLERANCE[recipe])
        assert graphs() <= most
    done = graphs()
    for length in LENGTHS:
        step(model, ids(length))
    assert graphs() == done
    assert not counters["graph_break"]


@pytest.mark.parametrize("keep", [None, saved], ids=["kept", "checkpointed"])
def test_lengths_of_a_prepared_model(recipe: str, keep: Any):
    """The first length's graph, then one of symbols for all others."""
    model = build(Language, keep)
    plain = copy.deepcopy(build())
    follows(scaleprop.prepare_training(model, recipe, inner="eager"), plain, recipe, 2)


def test_lengths_of_a_dynamic_model(recipe: str):
    model = build()
    compiled = torch.compile(model, backend="scaleprop", dynamic=True, fullgraph=True,
                             options={"recipe": recipe, "inner": "eager"})
    follows(compiled, build(), recipe, 1)


def test_lengths_and_batches_at_once(recipe: str):
    model, plain = build(), build()
    scaleprop.prepare_training(model, recipe, inner="eager")
    for length, batch in ((8, 4), (12, 3), (5, 6), (9, 2)):
        given = ids(length, batch)
        assert_parallel(step(model, given), step(plain, given), *TOLERANCE[recipe])
    assert graphs() <= 3  # one or two until both are symbols


def test_a_checkpointed_region_around_a_prepared_model(recipe: str):
    class Around(nn.Module):
        def __init__(self, keep: Any) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.block, self.keep = Block(), keep

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.keep(self.block, self.first(x)).square().mean()

    x = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for keep in (saved, lambda block, x: block(x)):
        torch._dynamo.reset()
        model = build(Around, keep)
        scaleprop.prepare_training(model.block, recipe, inner="eager")
        found.append(step(model, x))
        assert len(scaleprop.scale_report(model.block)) == (0 if recipe == "fp32" else 1)
    assert_equal(*found)
    assert_parallel(found[0], step(build(Around, lambda block, x: block(x)), x),
                    *TOLERANCE[recipe])


def test_a_checkpointed_region_inside_of_a_prepared_model(recipe: str):
    """What is computed twice is rounded alike twice."""
    found = []
    for keep in (saved, None):
        torch._dynamo.reset()
        model = build(Language, keep)
        found.append(step(scaleprop.prepare_training(model, recipe, inner="eager"), ids(8)))
        if recipe == "fp8":
            (report,) = scaleprop.scale_report(model)
            assert len(report.products) == 4 * 3  # the head stays high
    assert_equal(*found)


def test_dropout_in_a_checkpointed_region_draws_the_same_twice(recipe: str):
    found = []
    for keep in (saved, None):
        torch._dynamo.reset()
        model = build(Language, keep)
        for block in model.blocks:
            block.dropout.p = 0.3
        found.append(step(scaleprop.prepare_training(model, recipe, inner="eager"), ids(8)))
    assert_equal(*found)


def test_export_gives_the_model_in_its_own_precision(recipe: str):
    """Exponents change no function, casts are training's: what is exported is the plain model."""
    model = build()
    scaleprop.prepare_training(model, recipe, inner="eager")
    step(model, ids(8))
    exported = torch.export.export(model, (ids(8),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert exported.state_dict.keys() == model.state_dict().keys()
    for length in (8, 5):
        assert torch.equal(exported.module()(ids(length)), build()(ids(length)))
    step(model, ids(8))  # and is trained on as before


def test_evaluation_after_training(recipe: str):
    """Dropout off, no gradients: what the same weights give in eager mode."""
    model = build()
    for block in model.blocks:
        block.dropout.p = 0.5
    scaleprop.prepare_training(model, recipe, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for length in (8, 8, 12):
        step(model, ids(length))
        optimizer.step()
    plain = build()
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    with torch.no_grad():
        for length in (8, 12, 6):
            got, want = model(ids(length)), plain(ids(length))
            assert not got.requires_grad
            torch.testing.assert_close(got, want, rtol=1e-5 if recipe == "fp32" else 1e-2, atol=0)
            assert torch.equal(got, model(ids(length)))  # nothing is drawn
    model.train()
    assert all(t.isfinite().all() for t in step(model, ids(8)))


def test_a_recipe_is_changed_and_changed_back():
    model, plain = build(), build()
    want = step(plain, ids(8))
    found = []
    for recipe in ("fp8", "fp32", "fp8"):
        scaleprop.prepare_training(model, recipe, inner="eager")  # type: ignore[arg-type]
        found.append(step(model, ids(8)))
        assert len(scaleprop.scale_report(model)) == (recipe == "fp8")
    assert_equal(found[1], want)
    assert_equal(found[0], found[2])
    assert not torch.equal(found[0][0], want[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_before_training(recipe: str, mode: Callable[[], Any]):
    """The first graph has no gradients; the second one does."""
    model = scaleprop.prepare_training(build(), recipe, inner="eager")  # type: ignore[arg-type]
    with mode():
        first = model(ids(8))
    assert not first.requires_grad
    assert_parallel(step(model, ids(8)), step(build(), ids(8)), *TOLERANCE[recipe])


def test_two_models_of_one_class_have_their_own_exponents():
    """The second one's weights are larger: what was fixed for the first does not hold for it."""
    first, second = build(), build()
    with torch.no_grad():
        for block in second.blocks:
            block.up.weight.mul_(2.0**10)
    found = []
    for model in (first, second):
        scaleprop.prepare_training(model, "fp8", inner="eager")
        step(model, ids(8))
        (report,) = scaleprop.scale_report(model)
        found.append({cast.value: cast.exponent for cast in report.casts if cast.kind == "w"})
    assert found[0].keys() == found[1].keys()
    moved = [name for name in found[0] if found[0][name] != found[1][name]]
    assert len(moved) == 1 and found[1][moved[0]] - found[0][moved[0]] >= 4
