"""What a model checkpoints, its unit-scaled copy does: same numbers, as little kept."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import scaleprop
from scaleprop.passes.unit.checkpoints import Checkpointed

WIDTH = 16
X = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)



class Net(nn.Module):
    """Residual blocks, each run by ``run``, and a readout."""

    def __init__(self, run: Callable[..., Any], block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x)


def plainly(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def later(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, x, use_reentrant=True)


def nested(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's second half checkpointed in the checkpointed block."""
    layers: Any = block

    def outer(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layers[2:], layers[:2](x), use_reentrant=False)

    return checkpoint(outer, x, use_reentrant=False)


def at_once(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


def closing_over(block: nn.Module, x: torch.Tensor, call: Any = checkpoint) -> torch.Tensor:
    """Two results, one of them of a value from outside."""
    square = x.square()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = block(x)
        return y, y * square

    one, two = call(run, x, use_reentrant=False)
    return one + two


def without_gradient(block: nn.Module, x: torch.Tensor, call: Any = checkpoint) -> torch.Tensor:
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            size = x.abs().mean()
        return block(x) * size

    return call(run, x, use_reentrant=False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, WIDTH))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, WIDTH))


def scaled(run: Callable[..., Any], block: Callable[[], nn.Module] = mlp) -> scaleprop.UnitScaled:
    torch.manual_seed(0)
    return scaleprop.unit_scale(Net(run, block).double(), (X,))


def step(model: nn.Module, x: torch.Tensor = X) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept for backward, parameters apart; the output, and the gradients."""
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    model.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = model(x)
    y.square().sum().backward()
    return sum(kept.values()), [y.detach(), *(p.grad for p in model.parameters()
                                              if p.grad is not None)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("run", [later, reentrant, nested])
@pytest.mark.parametrize("block", [mlp, normed])
def test_same_bits_and_no_more_kept_than_in_the_model(run: Any, block: Any) -> None:
    plain, found = scaled(plainly, block), scaled(run, block)
    before, expected = step(plain)
    kept, results = step(found)
    assert_equal(results, expected)
    torch.manual_seed(0)
    eager, _ = step(Net(later, block).double())
    assert kept <= eager < before / 2
    regions = 6 if run is nested else 3
    assert found.scaling.checkpointed == regions and plain.scaling.checkpointed == 0
    assert sum(isinstance(m, Checkpointed) for m in found.modules()) == regions


@pytest.mark.parametrize("run", [closing_over, without_gradient])
def test_regions_with_several_inputs_and_results(run: Any) -> None:
    before, expected = step(scaled(functools.partial(run, call=at_once)))
    kept, results = step(scaled(run))
    assert_equal(results, expected)
    assert kept < before / 2


def test_operators_that_a_policy_keeps_are_kept() -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts,
                                 [torch.ops.aten.mm.default])
    both = [scaled(functools.partial(lambda block, x, **options: checkpoint(
        block, x, use_reentrant=False, **options), **options))
        for options in ({}, {"context_fn": contexts})]
    (_, expected), (_, results) = (step(model) for model in both)
    assert_equal(results, expected)
    calls = [count_products(model) for model in both]
    assert count_products(pickle.loads(pickle.dumps(both[1]))) == calls[1]
    assert calls[0] == calls[1] + 3  # each block's first; its last product is never needed again


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def count_products(model: nn.Module) -> int:
    with Products() as products:
        step(model)
    return products.count


def test_states_switch_and_statistics_move_as_in_the_model() -> None:
    torch.manual_seed(0)
    given = Net(later, normed).double()
    found = scaleprop.unit_scale(given, (X,))
    assert list(found.state_dict()) == list(given.state_dict())
    names = [name for name, _ in found.named_buffers() if "num_batches" in name]
    step(found)
    counts = [int(found.get_buffer(name)) for name in names]
    step(given)
    assert counts == [int(given.get_buffer(name)) for name in names] == [2, 2, 2]  # run twice
    found.eval()
    assert all(not m.training for m in found.modules())
    with torch.no_grad():
        assert torch.equal(found(X), found(X))
    assert [int(found.get_buffer(name)) for name in names] == counts


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_copies_checkpoint_too(copied: Any) -> None:
    found = scaled(later)
    other = copied(found)
    (kept, results), (expected_kept, expected) = step(other), step(found)
    assert kept == expected_kept
    assert_equal(results, expected)
    assert not {id(p) for p in found.parameters()} & {id(p) for p in other.parameters()}
    other.eval()
    found.train()
    assert torch.equal(other(X), other(X)) and not torch.equal(found(X), found(X))


@pytest.mark.parametrize("run", [later, nested])
def test_compiles_with_its_checkpoints(run: Any) -> None:
    found = scaled(run).eval()
    _, expected = step(found)
    before, _ = step(scaled(plainly).eval())
    torch.compiler.reset()
    compiled: Any = torch.compile(found, fullgraph=True, backend="aot_eager")
    kept, results = step(compiled)
    assert kept < before / 2
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    found = scaled(later).eval()
    exported = torch.export.export(found, (X,), strict=strict)
    torch.testing.assert_close(exported.module()(X), found(X))


def test_other_batch_sizes() -> None:
    found, plain = scaled(later).eval(), scaled(plainly).eval()
    assert_equal(step(found, X[:7])[1], step(plain, X[:7])[1])


def test_only_in_training() -> None:
    """A model that checkpoints where it trains, as Hugging Face's do."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    ids = torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    results = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).double().train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        unit = scaleprop.unit_scale(model, {"input_ids": ids, "labels": ids})
        assert unit.scaling.checkpointed == 2 * checkpoints
        loss = unit(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in unit.parameters())])
    assert_equal(results[1], results[0])


class OnlyInTraining(Net):
    """Checkpoints where it trains, and computes something else there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + (later(block, x).tanh() if self.training else block(x))
        return self.head(x)


def test_what_is_lost_is_noted() -> None:
    torch.manual_seed(0)
    found = scaleprop.unit_scale(OnlyInTraining(plainly, mlp).double(), (X,))
    assert found.scaling.checkpointed == 0
    assert any("3 checkpointed regions" in note for note in found.scaling.notes)
    assert any("code that only runs in training" in note for note in found.scaling.notes)
