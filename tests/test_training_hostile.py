"""What training code does to a model besides the plain loop: each is right, or refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import scaleprop
from scaleprop.errors import CalibrationError, ConfigError

RECIPES = ("fp32", "bf16", "fp8", "fp8-unscaled")
# least cosine of all gradients with float32's
CLOSE = {"fp32": 1 - 1e-10, "bf16": 0.9995, "fp8": 0.995, "fp8-unscaled": 0.98}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(),
                         nn.Linear(32, 16))


def twins(model: nn.Module, recipe: Any) -> tuple[nn.Module, nn.Module]:
    """A plain copy, and one prepared."""
    return copy.deepcopy(model), scaleprop.prepare_training(model, recipe, inner="eager")


def step(model: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    """All gradients of one step, in a row."""
    model.zero_grad()
    model(*given).float().square().mean().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_close(got: torch.Tensor, want: torch.Tensor, recipe: str) -> None:
    assert got.shape == want.shape
    assert functional.cosine_similarity(got, want, dim=0) >= CLOSE[recipe]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_so(recipe: str, value: float):
    plain, prepared = twins(layers(), recipe)
    x = torch.randn(8, 16)
    step(prepared, x)  # exponents are fixed on a good batch
    x[3, 2] = value
    rows = prepared(x).isfinite().all(1)
    assert torch.equal(rows, plain(x).isfinite().all(1)) and rows.sum() == 7
    assert torch.equal(step(prepared, x).isfinite(), step(plain, x).isfinite())


@pytest.mark.parametrize("recipe", ["fp8", "fp8-unscaled"])
def test_loss_scaling_sees_an_overflow(recipe: str):
    scales: list[list[float]] = []
    for model in twins(layers(), recipe):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scales.append([])
        for bad in (False, True, False):
            x = torch.ones(4, 16)
            x[0, 0] = float("inf") if bad else 1.0
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales[-1].append(scaler.get_scale())
        assert all(p.isfinite().all() for p in model.parameters())
    assert scales[0] == scales[1] == [1024.0, 512.0, 512.0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(recipe: str, dtype: torch.dtype):
    plain, prepared = twins(layers().to(dtype), recipe)
    x = torch.randn(24, 16, dtype=dtype)
    reference = step(plain.double(), x.double())
    narrow = recipe == "fp32" and dtype.itemsize < 4
    assert_close(step(prepared, x), reference, "bf16" if narrow else recipe)


@pytest.mark.parametrize("factor", [1 / 32, 1.2, 8.0])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_are_measured_again(factor: float, assign: bool):
    plain, prepared = twins(layers(), "fp8")
    x = torch.randn(64, 16)
    step(prepared, x)
    first = prepared.scale_report()[0]
    loaded = {name: factor * value for name, value in layers().state_dict().items()}
    for model in (plain, prepared):
        model.load_state_dict(loaded, strict=True, assign=assign)
    assert_close(step(prepared, x), step(plain, x), "fp8")
    (now,) = prepared.scale_report()
    assert (now is first) == (factor == 1.2)


def test_copies_are_not_measured_again():
    prepared = scaleprop.prepare_training(layers(), "fp8", inner="eager")
    step(prepared, torch.randn(8, 16))
    big = {name: 100 * value for name, value in prepared.state_dict().items()}
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        copied.load_state_dict(big)
        assert torch.equal(copied[0].weight, big["0.weight"])
        with pytest.raises(ConfigError, match="was not given"):
            scaleprop.scale_report(copied)
    assert len(prepared.scale_report()) == 1
    scaleprop.prepare_training(prepared, "bf16", inner="eager")
    prepared.load_state_dict(big)  # no exponents, nothing to measure
    step(prepared, torch.randn(8, 16))
    assert len(prepared.scale_report()) == 1


@pytest.mark.parametrize(("model", "message"), [
    (None, "not NoneType"), (torch.ones(3), "not Tensor"), (lambda x: x, "not function"),
    (torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "TorchScript.*Remedy"),
])
def test_what_is_no_module_is_refused(model: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        scaleprop.prepare_training(model, "fp8")


def test_inputs_without_data_and_of_several_tensors():
    prepared = scaleprop.prepare_training(layers().to("meta"), "fp8", inner="eager")
    assert prepared(torch.empty(3, 16, device="meta")).shape == (3, 16)
    (report,) = prepared.scale_report()
    assert all(cast.exponent is None for cast in report.casts)
    prepared = scaleprop.prepare_training(layers(), "fp8", inner="eager")
    ragged = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)],
                                        layout=torch.jagged)
    with pytest.raises(Exception, match=r"NestedTensor is made of several tensors\. Remedy"):
        prepared(ragged)


class Adapted(nn.Module):
    """A frozen layer and what is learned beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, 16) / 4)
        self.up = nn.Parameter(torch.zeros(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = functional.linear(functional.linear(x, self.down), self.up)
        return self.base(x) + low


class Broken(nn.Module):
    """Two graphs, the second chosen by what the first computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = layers(), layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.then(y)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "adapted": lambda: nn.Sequential(Adapted(), nn.GELU(), Adapted()),
    "broken": Broken,
    "plain": lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)),
}


@pytest.mark.parametrize("recipe", ["fp32", "fp8"])
@pytest.mark.parametrize("name", ["adapted", "broken", "plain"])
def test_batches_of_any_size_one_after_another(name: str, recipe: str):
    plain, prepared = twins(MODELS[name](), recipe)
    x = torch.randn(48, 16)
    for given in (x, x[:0], x[:1], x[0], x[::2], x[:1].expand(9, 16)):
        got, want = step(prepared, given), step(plain, given)
        if given.numel():
            assert_close(got, want, recipe)
        else:
            assert torch.equal(got, want)  # zeros


def test_a_model_without_parameters():
    prepared = scaleprop.prepare_training(nn.Sequential(), "fp8", inner="eager")
    x = torch.randn(3, requires_grad=True)
    prepared(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_says_nothing_is_not_analyzed(value: float):
    x = torch.randn(4, 16)
    x[0, 0] = value
    with pytest.raises(CalibrationError, match=r"the loss is NaN or Inf.* 1 of 64 values.*Remedy"):
        scaleprop.analyze(layers(), x, loss_fn=lambda y: y.square().mean())


def test_gradients_of_inputs_alone_are_analyzed():
    x = torch.randn(4, 16, requires_grad=True)
    report = scaleprop.analyze(layers().requires_grad_(False), x,
                               loss_fn=lambda y: y.square().mean())
    assert any(row.phase == "backward" for row in report.tensors) and x.grad is None


def test_sizes_that_change_from_model_to_model_are_no_symbols():
    """Dynamo makes symbols of the sizes that a function was called with before: of this model, not
    of others. Convolutions over an unknown number of positions would stay high."""
    for size in (16, 12):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * (size - 2)**2, 4))
        scaleprop.prepare_training(model, "int4-cnn", inner="eager")
        model(torch.randn(4, 1, size, size)).square().mean().backward()
        (report,) = scaleprop.scale_report(model)
        assert {each.layer for each in report.quantized} == {"0.weight", "2.weight"}
