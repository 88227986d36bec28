"""Scaled optimizer state: saving is exact; what it does not take is named, or left and reported."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.optim import scaled_state
from tests.test_optim import BOUNDS, attached, problem, same, single, train


class Outside(torch.optim.Optimizer):
    """Not torch's: a step that is not known to treat parameters one by one; keeps all sorts."""

    def __init__(self, params: Iterable[Any], fails: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.fails = fails

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for param in itertools.chain.from_iterable(g["params"] for g in self.param_groups):
            state = self.state[param]
            if not state:
                state |= {"mean": torch.zeros_like(param), "history": [torch.ones(2)],
                          "seen": torch.zeros(3, dtype=torch.int64),
                          "rows": torch.zeros(param.shape[0] + 1)}
            state["seen"] += 1
            state["mean"].mul_(0.9).add_(param.grad)
            if self.fails:
                raise RuntimeError("half way")
            param.sub_(state["mean"], alpha=0.1)
        return loss


class Within(torch.optim.SGD):
    """A subclass that calls its base class's step and then uses its state."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for param in self.param_groups[0]["params"]:
            assert self.state[param]["momentum_buffer"].dtype == torch.float32
        return loss


def through_torch(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tensors flat by name, the rest as it is: state_dict holds nothing that hides a tensor."""
    flat = {f"{index}.{name}": value for index, entry in state["state"].items()
            for name, value in entry.items()}
    extra = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    safetensors.torch.save_file(flat | extra, folder / "state.safetensors")
    loaded = safetensors.torch.load_file(folder / "state.safetensors")
    entries: dict[int, dict[str, Tensor]] = {}
    for name in flat:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = loaded[name]
    return {"state": entries, "param_groups": state["param_groups"],
            **{name: loaded[name] for name in extra}}


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("kind", [*BOUNDS, "fp16-stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(kind: str, through: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, _, random = kind.partition("-")

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        options = {"generator": torch.Generator().manual_seed(9)} if random else {}
        model = problem()[0].to(dtype)
        optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], amsgrad=True)
        attached(optimizer, kind, **options)
        return model, optimizer

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    model, optimizer = start()
    for seed in range(4):
        step(model, optimizer, seed)
    other, resumed = start()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through(optimizer.state_dict(), tmp_path))
    for seed in range(4, 8):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert same(model.parameters(), other.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == resumed.state[b].keys()
        assert all(torch.equal(v.view(-1).view(torch.uint8), resumed.state[b][k].view(-1)
                               .view(torch.uint8)) for k, v in optimizer.state[a].items())


def test_float_state_loads_and_codes_are_not_taken_for_numbers() -> None:
    plain, param = single(torch.ones(300))
    plain.step()
    scaled, other = single(torch.ones(300))
    state = scaled_state(scaled)
    scaled.load_state_dict(plain.state_dict())
    assert "exp_avg" not in scaled.state[other]
    assert torch.allclose(state.decoded(other)["exp_avg"], plain.state[param]["exp_avg"], rtol=1e-3)
    plain.load_state_dict(scaled.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        plain.step()


def test_what_cannot_be_loaded_is_named() -> None:
    optimizer, _ = single(torch.ones(300))
    scaled_state(optimizer)
    optimizer.step()
    saved = optimizer.state_dict()

    def load(message: str, kind: str = "fp16", size: int = 300, drop: str = "",
             **options: Any) -> None:
        other, _ = single(torch.ones(size))
        scaled_state(other, kind, **options)
        entry = {k: v for k, v in saved["state"][0].items() if not drop or not k.endswith(drop)}
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict({**saved, "state": {0: entry}})

    load("kept as e4m3 here", "fp8")
    load(r"is torch.float16 \[300\] .* must be torch.float16 with torch.int16 \[1\]", size=200)
    load("lacks its exponents", drop="/exponent")
    load("without a generator", generator=torch.Generator())


def test_parameters_may_come_later_and_groups_differ() -> None:
    model, loss = problem()
    first, last = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index]
    optimizer = torch.optim.AdamW(first, lr=1e-2)
    scaled_state(optimizer)
    train(optimizer, loss, 3)
    optimizer.add_param_group({"params": last, "lr": 1e-3, "betas": (0.8, 0.95)})
    train(optimizer, loss, 3)
    assert all("exp_avg/f16/float32" in optimizer.state[p] for p in model.parameters())
    assert [optimizer.state[p]["step"].item() for p in (first[0], last[0])] == [6, 3]


def test_unknown_state_is_left_and_reported() -> None:
    param = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = Outside([param])
    state = scaled_state(optimizer)
    param.grad = torch.ones(4, 2)
    optimizer.step()
    entry = optimizer.state[param]
    assert "mean/f16/float32" in entry and entry["seen"].tolist() == [1, 1, 1]
    assert state.left == {"0.seen": "torch.int64, not floating",
                          "0.history": "a list, not a tensor",
                          "0.rows": "of shape [5], not the parameter's [4, 2]"}
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    saved = optimizer.state_dict()  # float until now: the step did not come to its end
    assert "mean/f16/float32" in saved["state"][0]
    state.remove()
    assert optimizer.state[param]["mean"].dtype == torch.float32
    scaled_state(optimizer)


def test_a_failing_step_leaves_the_optimizer_whole() -> None:
    optimizer, param = single(torch.ones(4, 2))
    scaled_state(optimizer)
    optimizer.step()
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [param]
    assert "exp_avg/f16/float32" in optimizer.state[param]


def test_subclass_that_calls_its_base_class() -> None:
    model, loss = problem()
    optimizer = Within(model.parameters(), lr=0.1, momentum=0.9)
    scaled_state(optimizer)
    train(optimizer, loss, 3)
    assert all("momentum_buffer/f16/float32" in optimizer.state[p] for p in model.parameters())


def test_layout_dtype_and_counters() -> None:
    wide = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    double = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    narrow = torch.nn.Parameter(torch.randn(5).bfloat16())
    scalar = torch.nn.Parameter(torch.ones(()))
    params = [wide, double, narrow, scalar]
    optimizer = torch.optim.Adam(params)
    state = scaled_state(optimizer)
    for param in params:
        param.grad = torch.randn_like(param)
    double.grad = torch.full_like(double, 1e-100)
    for _ in range(2):
        optimizer.step()
    assert state.decoded(wide)["exp_avg"].stride() == wide.stride()
    assert state.decoded(double)["exp_avg_sq"].dtype == torch.float64
    assert torch.allclose(state.decoded(double)["exp_avg_sq"] * 1e203, torch.full_like(double, 2.0),
                          rtol=1e-3)
    assert state.left.keys() == {"2.exp_avg", "2.exp_avg_sq"}  # as narrow as it would be
    assert optimizer.state[scalar]["exp_avg"].dtype == torch.float32
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_what_makes_no_sense_is_named() -> None:
    weight = torch.nn.Embedding(10, 3, sparse=True)
    weight(torch.tensor([1, 2])).sum().backward()
    sparse = torch.optim.SGD(weight.parameters(), lr=0.1, momentum=0.9)
    scaled_state(sparse)
    with pytest.raises(ConfigError, match=r"'momentum_buffer' of .* \[10, 3\] is sparse"):
        sparse.step()
    optimizer, param = single(torch.ones(3))
    scaled_state(optimizer)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("scaled already", optimizer, {}),
        (r"param_groups\[0\] has centered", torch.optim.RMSprop([param], centered=True), {}),
        ("differentiable", torch.optim.Adam([param], differentiable=True), {}),
        ("unknown dtype 'int4'; known: fp16, bf16, fp8", torch.optim.Adam([param]),
         {"dtype": "int4"}),
        ("not LBFGS", torch.optim.LBFGS([param]), {}),
        ("not Linear", torch.nn.Linear(1, 1), {}),
    ]
    for message, other, options in cases:
        with pytest.raises(ConfigError, match=message):
            scaled_state(other, **options)


def test_other_hooks_see_every_group() -> None:
    """Those from before scaled_state too: then the step is done at once, with the same result."""
    def run(hooked: bool) -> list[torch.Tensor]:
        model, loss = problem()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        seen: list[int] = []
        if hooked:
            optimizer.register_step_post_hook(
                lambda opt, *_: seen.append(len(opt.param_groups[0]["params"])))
        scaled_state(optimizer)
        train(optimizer, loss, 3)
        assert seen == ([4, 4, 4] if hooked else [])
        return [*model.parameters()]

    assert same(run(True), run(False))
