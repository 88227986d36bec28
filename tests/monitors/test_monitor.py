"""What monitors measure, against formulas in float64; and that they leave training alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.monitors import Measurement, Monitor, OperandRecord
from scaleprop.recipes.training import Operand, TrainingRecipe
from scaleprop.training import training_state

TOKENS, WIDTH, OUT = 64, 96, 32
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Array = Any


def one_layer(operand: Operand) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model whose factors are known: its input, its weight and the loss's own weights."""
    torch.manual_seed(0)
    recipe = TrainingRecipe(name="own", description="", high=(), operands=dict.fromkeys(
        ("fprop.x", "fprop.w", "wgrad.dy", "wgrad.x"), operand))
    model = scaleprop.prepare_training(nn.Linear(WIDTH, OUT, bias=False), recipe, inner="eager")
    x = torch.randn(TOKENS, WIDTH) * torch.logspace(-4, 1, WIDTH)
    return model, x, torch.randn(TOKENS, OUT) * torch.logspace(-6, 0, OUT)


def weighted(model: nn.Module, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return (model(x) * by).sum()


def of(measurement: Measurement, role: str, layer: str = "") -> OperandRecord:
    (found,) = [each for each in measurement.operands
                if each.role == role and layer in each.layer]
    return found


def mxfp4(x: Array) -> tuple[Array, Array]:
    """(scales of rows of blocks of 32, values in units of them) by OCP MX 1.0: 2^(⌊log₂ amax⌋-2),
    saturating."""
    blocks = x.reshape(len(x), -1, 32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(-1))) - 2)
    return scale, blocks / scale[..., None]


def nvfp4(x: Array) -> tuple[Array, Array]:
    """The same for NVFP4: E4M3 scales under amax/(6·448), all in float32."""
    blocks = x.reshape(len(x), -1, 16).astype(np.float32)
    outer = np.float32(np.abs(x).max()) / np.float32(6 * 448)
    inner = (np.abs(blocks).max(-1) / np.float32(6) / outer).astype(ml_dtypes.float8_e4m3fn)
    scale = inner.astype(np.float64) * np.float64(outer)
    with np.errstate(divide="ignore", invalid="ignore"):
        return scale, np.where(scale[..., None] > 0, blocks / scale[..., None], 0.0)


def e2m1(units: Array) -> Array:
    return units.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.mark.parametrize(("format", "by_hand"), [("mxfp4", mxfp4), ("nvfp4", nvfp4)])
@pytest.mark.parametrize("role", ["fprop.x", "fprop.w", "wgrad.dy", "wgrad.x"])
def test_records_are_what_the_formulas_say(format: str, by_hand: Any, role: str) -> None:
    model, x, by = one_layer(Operand(format=format))
    found = of(Monitor(model, loss_fn=weighted).measure(x, by), role)
    data = {"fprop.x": x, "fprop.w": model.weight, "wgrad.dy": by.t(), "wgrad.x": x.t()}[role]
    wide: Array = data.detach().double().numpy()
    scale, units = by_hand(wide)
    values = e2m1(units)
    restored = (values * scale[..., None]).reshape(wide.shape)
    error = restored - wide
    assert found.format == format
    assert found.amax == np.abs(wide).max()
    assert found.rms == pytest.approx(math.sqrt((wide**2).mean()), rel=1e-12)
    assert found.underflow == np.mean((wide != 0) & (restored == 0)) > 0
    assert found.saturated == np.mean(np.abs(units) > 7.0)  # 6, and half the step from 4
    assert found.sqnr_db == pytest.approx(
        10 * math.log10((wide**2).sum() / (error**2).sum()), abs=1e-4)
    assert found.bias == pytest.approx((error * np.sign(wide)).mean() / np.abs(wide).mean(),
                                       abs=1e-6)
    exponents = Counter(np.floor(np.log2(scale[scale > 0])).astype(int).flatten().tolist())
    assert found.exponents == exponents
    assert found.layer == "weight"


def test_zeros_are_no_underflow_and_have_no_scale() -> None:
    model, x, by = one_layer(Operand(format="mxfp4"))
    x[:, :32] = 0.0
    found = of(Monitor(model, loss_fn=weighted).measure(x, by), "fprop.x")
    assert sum(found.exponents.values()) == TOKENS * (WIDTH - 32) // 32
    x.zero_()
    found = of(Monitor(model, loss_fn=weighted).measure(x, by), "fprop.x")
    assert (found.underflow, found.saturated, found.bias, found.sqnr_db) == (0, 0, 0, math.inf)
    assert not found.exponents


def test_data_that_are_not_numbers_are_recorded() -> None:
    model, x, by = one_layer(Operand(format="nvfp4"))
    x[0, 0] = math.nan
    found = of(Monitor(model, loss_fn=weighted).measure(x, by), "fprop.x")
    assert math.isnan(found.amax) and math.isnan(found.sqnr_db)
    assert not found.exponents


def test_what_is_rounded_to_bfloat16_has_no_scales() -> None:
    model, x, by = one_layer(Operand(format="bf16", rounding="nearest"))
    recipe = TrainingRecipe(name="own", description="", high=(), operands={
        "fprop.x": Operand(format="bf16"), "fprop.w": Operand(format="mxfp8")})
    scaleprop.prepare_training(model, recipe, inner="eager")
    found = of(Monitor(model, loss_fn=weighted).measure(x, by), "fprop.x")
    error = x.bfloat16().double() - x.double()
    assert found.sqnr_db == pytest.approx(
        10 * math.log10(x.double().square().sum() / error.square().sum()), abs=1e-9)
    assert not found.exponents and found.saturated == 0


def test_weights_that_move_and_flip() -> None:
    model, x, by = one_layer(Operand(format="mxfp4"))
    monitor = Monitor(model, loss_fn=weighted)
    first = of(monitor.measure(x, by), "fprop.w")
    assert first.flipped is None and first.oscillation is None
    before = model.weight.detach().double().numpy().copy()
    with torch.no_grad():
        model.weight.add_(torch.randn(OUT, WIDTH) * 0.01)
    after = model.weight.detach().double().numpy()
    found = of(monitor.measure(x, by), "fprop.w")
    scales, units = zip(*map(mxfp4, (before, after)), strict=True)
    old, new = map(e2m1, units)
    assert found.flipped == np.mean(old != new) > 0
    jumped = np.abs(new * scales[1][..., None] - old * scales[0][..., None]).sum()
    assert found.oscillation == pytest.approx(jumped / np.abs(after - before).sum(), rel=1e-6)
    still = of(monitor.measure(x, by), "fprop.w")
    assert still.flipped == 0 and still.oscillation is None
    assert of(monitor.records[-1], "fprop.x").flipped is None


class Net(nn.Module):
    """With random numbers and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 64)
        self.norm = nn.BatchNorm1d(64)
        self.middle = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(64, 8)
        self.register_buffer("average", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)  # another tensor
        return self.head(torch.tanh(self.middle(hidden))).square().mean()


def train(recipe: str, every: int | None, steps: int = 4) -> tuple[list[torch.Tensor], Any]:
    """Every number that a run leaves behind, and its monitor."""
    torch.manual_seed(0)
    model = scaleprop.prepare_training(Net(), recipe, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = None if every is None else Monitor(model, every=every)
    data = torch.Generator().manual_seed(1)
    left: list[torch.Tensor] = []
    for _ in range(steps):
        x = torch.randn(TOKENS, WIDTH, generator=data)
        loss = model(x)
        loss.backward()
        if monitor is not None:
            monitor.step(x)
        left += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    left += [value.clone() for value in model.state_dict().values()]
    left += [value.clone() for _, value in sorted(training_state(model).state_dict().items())]
    return [*left, torch.get_rng_state()], monitor


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-delayed", "fp8"])
def test_training_is_the_same_bit_for_bit(recipe: str) -> None:
    alone, _ = train(recipe, None)
    watched, monitor = train(recipe, 2)
    assert [record.step for record in monitor.records] == [2, 4]
    assert len(alone) == len(watched)
    assert all(map(torch.equal, alone, watched))


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-delayed", "mxfp4-quartet"])
def test_gradients_are_those_of_the_step_just_made(recipe: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.drop.p, high = 0.0, copy.deepcopy(model)
    high.drop.p = 0.0
    scaleprop.prepare_training(model, recipe, inner="eager")
    monitor, x = Monitor(model), torch.randn(TOKENS, WIDTH)
    for scale in (1.0, 8.0, 2.0):  # the last one is scaled by what the others left
        model.zero_grad()
        model(x * scale).backward()
    record = monitor.measure(x * 2.0)
    high.double()(x.double() * 2.0).backward()
    ours, theirs = dict(model.named_parameters()), dict(high.named_parameters())
    assert {each.parameter for each in record.gradients} == set(ours)
    for each in record.gradients:
        if each.parameter == "first.bias":  # batch norm makes it zero, but for rounding
            continue
        low, exact = (values[each.parameter].grad.double().flatten() for values in (ours, theirs))
        cosine = float(low @ exact / (low.norm() * exact.norm()))
        assert each.cosine == pytest.approx(cosine, abs=1e-6)
        assert each.norm_ratio == pytest.approx(float(low.norm() / exact.norm()), rel=1e-5)
        assert each.cosine < 0.99999 or "head" in each.parameter


def test_a_delayed_scale_that_saturates_is_seen() -> None:
    model, x, by = one_layer(Operand(format="e4m3[tensor]*f32", scaling="delayed:4"))
    monitor = Monitor(model, loss_fn=weighted)
    weighted(model, x, by).backward()
    assert of(monitor.measure(x, by), "fprop.x").saturated == 0
    weighted(model, 4 * x, by).backward()
    found = of(monitor.measure(4 * x, by), "fprop.x")
    scale = float(x.abs().max()) / 448.0
    beyond = float(((4 * x).double().abs() / scale > 448.0 + 16.0).double().mean())
    assert found.saturated == pytest.approx(beyond, abs=1e-9)
    assert beyond > 0 and found.bias < 0
    assert found.exponents == {math.floor(math.log2(scale)): 1}
    weighted(model, 4 * x, by).backward()
    assert of(monitor.measure(4 * x, by), "fprop.x").saturated == 0


def test_a_loss_that_fails_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = scaleprop.prepare_training(Net(), "mxfp8", inner="eager")
    x = torch.randn(TOKENS, WIDTH)
    model(x).backward()
    call, state = model._compiled_call_impl, copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]

    def fails(model: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"after {model(x)}")

    numbers = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="after"):
        Monitor(model, loss_fn=fails).measure(x)
    assert model._compiled_call_impl is call
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_steps_between_run_nothing() -> None:
    model, x, by = one_layer(Operand(format="mxfp4"))
    calls: list[int] = []

    def loss_fn(model: Any, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return weighted(model, x, by)

    monitor = Monitor(model, every=3, loss_fn=loss_fn, start=9)
    assert monitor.step(x, by) is None and monitor.step(x, by) is None
    assert not calls and not monitor.records
    found = monitor.step(x, by)
    assert found is monitor.records[0] and found.step == 12
    assert len(calls) == 2


def test_another_shape_and_no_step_before_are_measured() -> None:
    model, x, by = one_layer(Operand(format="nvfp4", rounding="stochastic:8"))
    monitor = Monitor(model, loss_fn=weighted)
    for size in (TOKENS, 16, 48):
        found = of(monitor.measure(x[:size], by[:size]), "fprop.x")
        assert sum(found.exponents.values()) <= size * WIDTH // 16
    assert training_state(model).state_dict().keys() == {"seed"}


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="was not given to"):
        Monitor(nn.Linear(4, 4))
    model, _, _ = one_layer(Operand(format="mxfp4"))
    with pytest.raises(ConfigError, match="every=0"):
        Monitor(model, every=0)
    with pytest.raises(ConfigError, match="start=-1"):
        Monitor(model, start=-1)
    with pytest.raises(ConfigError, match="loss_fn='mse'"):
        Monitor(model, loss_fn="mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "e5m2"])
def test_recipes_that_leave_nothing_to_measure(recipe: str) -> None:
    model = scaleprop.prepare_training(nn.Linear(4, 4), recipe, inner="eager")
    with pytest.raises(ConfigError, match="quantizes nothing that a monitor measures"):
        Monitor(model)


def test_losses_that_are_none() -> None:
    model, x, by = one_layer(Operand(format="mxfp4"))
    with pytest.raises(ConfigError, match=r"a tensor \(64, 32\), not a scalar"):
        Monitor(model).measure(x)
    with pytest.raises(ConfigError, match="dict, not a scalar"):
        Monitor(model, loss_fn=lambda model, x: {"loss": model(x).sum()}).measure(x)  # type: ignore[arg-type,return-value]
    monitor = Monitor(model, loss_fn=weighted)
    scaleprop.prepare_training(model, "mxfp8", inner="eager")
    with pytest.raises(ConfigError, match="another recipe since"):
        monitor.measure(x, by)


def test_a_model_that_stays_high() -> None:
    model = scaleprop.prepare_training(nn.LayerNorm(WIDTH), "mxfp8", inner="eager")
    with pytest.raises(ConfigError, match="no product of the model is quantized"):
        Monitor(model, loss_fn=weighted).measure(torch.randn(8, WIDTH), torch.randn(8, WIDTH))


def solved_model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(),
                          nn.Linear(48, 8))
    return model, torch.randn(TOKENS, WIDTH)


def squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_exponents_that_are_fixed_are_the_runs_own(inner: Any) -> None:
    model, x = solved_model()
    scaleprop.prepare_training(model, "fp8", inner=inner)
    monitor = Monitor(model, loss_fn=squared)
    squared(model, x).backward()
    larger = 4096 * x  # exponents stay those of the first batch
    record = monitor.measure(larger)
    casts = [cast for report in scaleprop.scale_report(model) for cast in report.casts]
    chosen = Counter((cast.kind, cast.exponent) for cast in casts if cast.exponent is not None)
    measured = Counter((each.role, *each.exponents) for each in record.operands)
    assert chosen <= measured and chosen.total() >= 4
    # the others' scales are found at run time
    assert Counter(cast.kind for cast in casts) == Counter(e.role for e in record.operands)
    found = of(record, "x", "0.weight")
    (exponent,) = found.exponents
    units = larger.double().numpy() / 2.0**exponent
    values = np.clip(units, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert found.amax == float(larger.abs().max())
    assert found.saturated == np.mean(np.abs(units) > 464) > 0
    assert found.underflow == np.mean((units != 0) & (values == 0))
    noise = ((values - units) ** 2).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10((units**2).sum() / noise), abs=1e-9)
    weight = of(record, "w", "2.weight")
    assert weight.amax == pytest.approx(float(model[2].weight.detach().abs().max()))


def test_gradients_of_fixed_exponents_and_of_those_found_anew() -> None:
    model, x = solved_model()
    high = copy.deepcopy(model).double()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    monitor = Monitor(model, loss_fn=squared)
    for scale in (1.0, 2.0**-12):
        weights = {name: value * scale for name, value in high.state_dict().items()}
        model.load_state_dict(weights)
        high.load_state_dict(weights)
        model.zero_grad()
        high.zero_grad()
        squared(model, x).backward()
        squared(high, x.double()).backward()
        record = monitor.measure(x)
        for each in record.gradients:
            low, exact = (dict(m.named_parameters())[each.parameter].grad.double().flatten()
                          for m in (model, high))
            cosine = float(low @ exact / (low.norm() * exact.norm()))
            assert each.cosine == pytest.approx(cosine, abs=1e-6)
        assert {each.role for each in record.operands} == {"x", "w", "dy"}


def test_exponents_of_graphs_for_any_size() -> None:
    model, x = solved_model()
    scaleprop.prepare_training(model, "fp8", inner="eager", dynamic=True)
    monitor = Monitor(model, loss_fn=squared)
    squared(model, x).backward()
    for size in (TOKENS, 24):
        found = of(monitor.measure(1024 * x[:size]), "x", "0.weight")
        assert found.saturated > 0 and found.amax == 1024 * float(x[:size].abs().max())


def test_fixed_exponents_are_not_known_before_the_first_step() -> None:
    model, x = solved_model()
    scaleprop.prepare_training(model, "fp8", inner="eager")
    with pytest.raises(ConfigError, match="was not called yet"):
        Monitor(model, loss_fn=squared).measure(x)
