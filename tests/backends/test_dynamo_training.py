"""A compiled model is trained as any other: what users do with one, in both recipes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scaleprop.backends.dynamo import scaleprop

from .joint_graphs import assert_equal, assert_parallel, step

RECIPES = ("fp32", "bf16", "fp8")
# 1 − cosine, |ratio of lengths − 1|; gradients of a loss are alike, and E5M2 rounds all one way
TOLERANCE = {"fp32": (1e-10, 1e-6), "bf16": (5e-5, 1e-2), "fp8": (2e-2, 8e-2)}


class Model(nn.Module):
    """Two residual layers on embeddings, and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 20, bias=False)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        return y + self.dropout(self.down(F.gelu(self.up(self.norm(y)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.hidden(x)).flatten(0, 1), x.roll(1, 1).flatten())


class Broken(Model):
    """A graph break in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(y).flatten(0, 1), x.roll(1, 1).flatten())


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank one beside it, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: type[nn.Module] = Model, *given: Any) -> Any:
    torch.manual_seed(0)
    return kind(*given)


def batch(size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (size, 8), generator=torch.Generator().manual_seed(seed))


def compile_(model: Any, recipe: str, **options: Any) -> Any:
    return torch.compile(model, backend=scaleprop,
                         options={"recipe": recipe, "inner": "eager"}, **options)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare(
    run: Callable[[Any, nn.Module], list[torch.Tensor]], recipe: str, model: nn.Module
) -> None:
    """``run(compiled, model)`` against ``run(model, model)``."""
    plain = copy.deepcopy(model)
    want = run(plain, plain)
    got = run(compile_(model, recipe), model)
    if recipe != "fp32":
        assert not all(map(torch.equal, got, want))
    assert_parallel(got, want, *TOLERANCE[recipe])


def test_graph_breaks(recipe: str):
    compare(lambda run, _: step(run, batch()), recipe, build(Broken))


def test_gradients_accumulate(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        for seed in range(2):
            (model(batch(seed=seed)) / 2).backward()
        return gradients(owner)

    compare(run, recipe, build())


def test_evaluation_between_steps(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(owner.parameters(), 0.1)
        seen = []
        for seed in range(3):
            loss = model(batch(seed=seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                seen += [loss.detach(), model(batch(seed=9))]
        return [torch.stack(seen)]

    compare(run, recipe, build())


def test_train_and_eval_modes(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        seen = []
        for training in (True, False, True):
            owner.train(training)
            torch.manual_seed(1)
            loss = model(batch())
            loss.backward()
            seen.append(loss.detach())
        assert seen[0] == seen[2] != seen[1]
        return [torch.stack(seen), *gradients(owner)]

    compare(run, recipe, build(Model, 0.3))


def test_autocast(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch())
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in owner.parameters())
        return [loss.detach(), *gradients(owner)]

    compare(run, recipe, build())


def test_gradients_are_clipped(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        model(batch()).backward()
        norm = nn.utils.clip_grad_norm_(owner.parameters(), 0.1)
        return [norm, *gradients(owner)]

    compare(run, recipe, build())


def test_two_losses(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        loss = model(batch()) + 0.5 * model(batch(seed=1))
        loss.backward()
        return [loss.detach(), *gradients(owner)]

    compare(run, recipe, build())


def test_frozen_parameters(recipe: str):
    model = build()
    for frozen in (model.embed, model.up):
        frozen.requires_grad_(False)
    compare(lambda run, _: step(run, batch()), recipe, model)
    assert model.embed.weight.grad is None and model.down.weight.grad is not None


def test_low_rank_training(recipe: str):
    def run(model: Any, owner: nn.Module) -> list[torch.Tensor]:
        learned = [p for p in owner.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, 0.5)
        seen = []
        for _ in range(3):
            seen += step(model, batch())
            optimizer.step()
        return seen

    model = build().requires_grad_(False)
    model.up, model.down = Adapted(model.up), Adapted(model.down)
    compare(run, recipe, model)
    assert model.up.b.any()


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1), (False, 3)])
def test_another_batch_size(recipe: str, dynamic: bool | None, graphs: int):
    """One graph for all sizes, as soon as Dynamo makes them symbols."""
    model = build()
    counters.clear()
    compiled = compile_(model, recipe, dynamic=dynamic)
    for size in (4, 6, 3, 4):
        assert_parallel(step(compiled, batch(size)), step(model, batch(size)), *TOLERANCE[recipe])
    assert counters["stats"]["unique_graphs"] == graphs


class Attending(nn.Module):
    """Its output, and so the gradient that comes in, is laid out as another tensor's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


def test_gradients_that_are_not_contiguous(recipe: str):
    torch.manual_seed(1)
    x = torch.randn(8, 16, 32)
    compare(lambda run, _: step(run, x), recipe, build(Attending))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_regions(recipe: str, dropout: float):
    class Checkpointed(Model):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().hidden, x, use_reentrant=False)  # type: ignore[return-value]

    want = step(compile_(build(Model, dropout), recipe), batch())
    got = step(compile_(build(Checkpointed, dropout), recipe), batch())
    assert_equal(got, want)


def test_a_tensor_given_twice_or_in_parts(recipe: str):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.layers(x) * y).sum()

    torch.manual_seed(1)
    x = torch.randn(8, 32)
    for given in ((x, x), (x[:4], x[4:]), (x[:5], x[3:])):
        torch._dynamo.reset()
        compare(lambda run, _, given=given: step(run, *given), recipe, build(Pair))


def test_names_of_parameters_stay(recipe: str):
    model = build()
    names = list(model.state_dict())
    counters.clear()
    want = step(model, batch())
    model.compile(backend=scaleprop, options={"recipe": recipe, "inner": "eager"})
    assert_parallel(step(model, batch()), want, *TOLERANCE[recipe])
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names
    other = build()
    other.load_state_dict(model.state_dict())
    assert_parallel(step(other, batch()), want, 1e-10, 1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"])
def test_the_module_is_still_copied(recipe: str, copied: Callable[[Any], Any]):
    model = build()
    compiled = compile_(model, recipe)
    got = step(compiled, batch())
    other = copied(model)
    want = step(other, batch())
    assert_parallel(got, want, *TOLERANCE[recipe])
    assert_parallel(step(compile_(other, recipe), batch()), got, 1e-10, 1e-6)


def test_losses_of_fp8_follow():
    losses = {}
    for recipe in ("fp32", "fp8"):
        torch._dynamo.reset()
        model = build()
        compiled = compile_(model, recipe)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses[recipe] = []
        for _ in range(5):
            loss = compiled(batch())
            losses[recipe].append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    exact, low = (torch.tensor(losses[recipe]) for recipe in ("fp32", "fp8"))
    assert exact[-1] < 0.8 * exact[0]
    assert not torch.equal(exact, low)
    torch.testing.assert_close(low, exact, rtol=0.005, atol=0)
