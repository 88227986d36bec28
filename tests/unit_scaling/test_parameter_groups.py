"""parameter_groups against factors computed by hand, and real optimizers that take them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError

WIDTH, HIDDEN, TOKENS = 16, 32, 10


class Net(nn.Module):
    """Embedding, one residual MLP branch, a norm, a readout."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


IDS = torch.arange(TOKENS).repeat(2)


def scaled(scheme: Any, tied: bool = False) -> tuple[nn.Module, dict[str, float]]:
    """A scaled model, and the RMS of the original's parameters."""
    torch.manual_seed(0)
    model = Net(tied)
    sizes = {name: float(p.detach().square().mean().sqrt())
             for name, p in model.named_parameters()}
    return scaleprop.unit_scale(model, (IDS,), scheme), sizes


def given(model: nn.Module, key: str, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


PRODUCTS = ("table.weight", "up.weight", "down.weight", "head.weight")


def test_unit_adam_keeps_relative_steps() -> None:
    model, sizes = scaled("unit")
    found = given(model, "lr", scaleprop.parameter_groups(model, "adam", lr=0.1))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, rate in found.items():
        expected = 0.1 / sizes[name] if name in PRODUCTS else 0.1
        assert rate == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize(("scheme", "expected"), [
    ("u-mup", {"table.weight": WIDTH**-0.5, "up.weight": WIDTH**-0.5,
               "down.weight": HIDDEN**-0.5, "head.weight": 1.0, "norm.weight": 1.0}),
    ("mus", {"table.weight": 1.0, "up.weight": math.sqrt(64 / WIDTH),
             "down.weight": math.sqrt(64 / HIDDEN), "head.weight": 1.0, "norm.weight": 1.0}),
])
def test_adam_by_width(scheme: Any, expected: dict[str, float]) -> None:
    model, _ = scaled(scheme)
    groups = scaleprop.parameter_groups(model, "adam", lr=0.5, base_width=64)
    found = given(model, "lr", groups)
    for name, factor in expected.items():
        assert found[name] == pytest.approx(0.5 * factor), name


@pytest.mark.parametrize("scheme", ["u-mup", "mus"])
def test_sgd_by_width_undoes_the_potential(scheme: Any) -> None:
    model, _ = scaled(scheme)
    found = given(model, "lr", scaleprop.parameter_groups(model, "sgd", lr=1.0))
    uses: Any = model.meta["unit_scaling"].parameters  # type: ignore[union-attr]
    widths = {"table.weight": WIDTH, "up.weight": WIDTH, "down.weight": HIDDEN,
              "head.weight": WIDTH}
    for name, width in widths.items():
        assert found[name] == pytest.approx(width * 2.0 ** -uses[name].potential), name


@pytest.mark.parametrize("scheme", ["unit", "u-mup", "mus"])
def test_muon_takes_matrices_inside_only(scheme: Any) -> None:
    model, sizes = scaled(scheme)
    found = given(model, "lr", scaleprop.parameter_groups(model, "muon", lr=1.0))
    assert set(found) == {"up.weight", "down.weight"}
    fan_in = {"up.weight": WIDTH, "down.weight": HIDDEN}
    for name, rate in found.items():
        expected = 1 / sizes[name] if scheme == "unit" else math.sqrt(fan_in[name])
        assert rate == pytest.approx(expected, rel=1e-5)


def test_tied_weight_takes_the_smallest_factor() -> None:
    model, _ = scaled("u-mup", tied=True)
    found = given(model, "lr", scaleprop.parameter_groups(model, "adam", lr=1.0))
    assert found["table.weight"] == pytest.approx(WIDTH**-0.5)
    assert "head.weight" not in found
    uses: Any = model.meta["unit_scaling"].parameters  # type: ignore[union-attr]
    assert set(uses["table.weight"].roles) == {"input", "output"}


def test_frozen_parameters_are_left_out() -> None:
    model, _ = scaled("unit")
    model.get_parameter("up.weight").requires_grad_(False)
    assert "up.weight" not in given(
        model, "lr", scaleprop.parameter_groups(model, "adam", lr=1.0))


@pytest.mark.parametrize("decay", ["products", "all"])
def test_decay_shrinks_all_alike(decay: Any) -> None:
    model, _ = scaled("unit")
    groups = scaleprop.parameter_groups(model, "adam", lr=0.1, weight_decay=0.3, decay=decay)
    rates, decays = given(model, "lr", groups), given(model, "weight_decay", groups)
    for name in rates:
        shrinks = decay == "all" or name in PRODUCTS
        assert rates[name] * decays[name] == pytest.approx(0.03 if shrinks else 0.0), name


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """How far one step moves each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(IDS), IDS).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_adamw_moves_by_the_rate() -> None:
    model, _ = scaled("u-mup")
    groups = scaleprop.parameter_groups(model, "adam", lr=0.01)
    rates = given(model, "lr", groups)
    moved = step(model, torch.optim.AdamW(groups, eps=1e-12))
    for name, change in moved.items():
        assert float(change.abs().max()) == pytest.approx(rates[name], rel=1e-2), name


def test_sgd_moves_along_true_gradients() -> None:
    model, sizes = scaled("unit")
    uses: Any = model.meta["unit_scaling"].parameters  # type: ignore[union-attr]
    groups = scaleprop.parameter_groups(model, "sgd", lr=0.01)
    moved = step(model, torch.optim.SGD(groups))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        true = parameter.grad * 2.0 ** -uses[name].potential
        divided = sizes[name] if name in PRODUCTS else 1.0
        torch.testing.assert_close(moved[name], -0.01 * true / divided**2, rtol=1e-3, atol=1e-6)


def test_muon_takes_its_groups() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    model, _ = scaled("mus")
    groups = scaleprop.parameter_groups(model, "muon", lr=0.01)
    moved = step(model, torch.optim.Muon(groups))
    assert all(bool(moved[name].any()) for name in ("up.weight", "down.weight"))
    assert not moved["head.weight"].any()


def test_compiled_model_is_looked_through() -> None:
    model, _ = scaled("unit")
    compiled: Any = torch.compile(model, backend="eager")
    plain, through = (
        [(group["lr"], group["params"]) for group in
         scaleprop.parameter_groups(each, "adam", lr=1.0)] for each in (model, compiled))
    assert len(plain) == len(through)
    for (rate, parameters), (other, others) in zip(plain, through, strict=True):
        assert rate == other and all(a is b for a, b in zip(parameters, others, strict=True))


def test_refuses() -> None:
    model, _ = scaled("unit")
    with pytest.raises(ConfigError, match="not unit-scaled"):
        scaleprop.parameter_groups(Net(), "adam", lr=1.0)
    with pytest.raises(ConfigError, match="unknown optimizer"):
        scaleprop.parameter_groups(model, "lion", lr=1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown decay"):
        scaleprop.parameter_groups(model, "adam", lr=1.0, decay="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(("wrong", "why"), [
    ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"), ({"lr": "x"}, "lr='x'"),
    ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay=-1.0"),
    ({"lr": 1.0, "base_width": 0}, "base_width=0"),
])
def test_refuses_numbers_that_are_no_rates(wrong: dict[str, Any], why: str) -> None:
    model, _ = scaled("mus")
    with pytest.raises(ConfigError, match=why):
        scaleprop.parameter_groups(model, "adam", **wrong)


def test_refuses_parameters_that_came_later() -> None:
    model, _ = scaled("unit")
    model.later = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="'later' is not known: it was added after"):
        scaleprop.parameter_groups(model, "adam", lr=1.0)


def test_what_muon_leaves_is_known_by_name() -> None:
    model, _ = scaled("u-mup")
    muon = scaleprop.parameter_groups(model, "muon", lr=1.0)
    taken = {name for group in muon for name in group["param_names"]}
    assert taken == {"up.weight", "down.weight"}
    rest = scaleprop.parameter_groups(model, "adam", lr=1.0, without=taken)
    optimizer = torch.optim.AdamW(rest)  # torch calls its names the same
    left = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert left == {name for name, _ in model.named_parameters()} - taken


@pytest.mark.parametrize(("model", "options", "why"), [
    (None, {}, "not NoneType"), (torch.sin, {}, "takes a torch.nn.Module"),
    (nn.Linear(2, 2), {"loss_fn": 3}, "loss_fn=3"), (nn.Linear(2, 2), {"scheme": ["unit"]},
                                                    "unknown scheme"),
])
def test_unit_scale_refuses(model: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        scaleprop.unit_scale(model, torch.randn(3, 2), **options)
