"""Scaled optimizer state: what is stored, and that training goes on as before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import scaleprop
from scaleprop import optim
from scaleprop.errors import ConfigError
from scaleprop.optim import FORMATS, decode_state, encode_state, entries, scaled_state

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
}


def problem(seed: int = 0) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """An MLP and its loss on a fixed regression task; each call of the loss draws new data."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.Tanh(), torch.nn.Linear(48, 4))
    mix = torch.randn(16, 4, generator=generator) * torch.logspace(0, -3, 16)[:, None]

    def loss() -> Tensor:
        x = torch.randn(64, 16, generator=generator)
        return (model(x) - (x @ mix).sin()).square().mean()

    return model, loss


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> float:
    """Mean loss of the last tenth."""
    values: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    last = values[-max(steps // 10, 1):]
    return sum(last) / len(last)


def attached(optimizer: torch.optim.Optimizer, kind: str, **options: Any) -> optim.ScaledState:
    """``fp8+`` has eight bits for squares, too."""
    if kind == "fp8+":
        options |= {"second": "fp8"}
        options.setdefault("generator", torch.Generator().manual_seed(7))
    return scaled_state(optimizer, kind.removesuffix("+"), **options)


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def single(value: Tensor, **options: Any) -> tuple[torch.optim.Optimizer, Tensor]:
    param = torch.nn.Parameter(torch.zeros_like(value))
    param.grad = value
    return torch.optim.Adam([param], **options), param


# --- numbers -------------------------------------------------------------------------------------


def slow(x: float, name: str, amax: float) -> float:
    """Nearest value of the element times the scale, found by looking at every value."""
    fmt = FORMATS[name]
    item = fmt.element
    exponent = math.ceil(math.log2(amax)) - fmt.top
    last = item.max_code if item.has_inf else item.max_code - 1  # element.max means Inf
    values = [item.magnitude(code) for code in range(fmt.unsigned, last + 1)]
    unit = math.ldexp(abs(x), -exponent)
    code = min(range(len(values)), key=lambda c: (abs(values[c] - unit), (c + fmt.unsigned) % 2))
    return math.copysign(math.ldexp(values[code], exponent), x)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_equals_a_slow_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, generator=generator) * torch.exp2(torch.linspace(-42.0, 6.0, 24))
    x = x.abs() if FORMATS[name].unsigned else x
    got = decode_state(*encode_state(x, FORMATS[name]), FORMATS[name], torch.float32)
    amax = x.abs().max().item()
    assert got.tolist() == [slow(value, name, amax) for value in x.tolist()]


@pytest.mark.parametrize("power", [-149, -140, -126, -40, 0, 60, 127])
@pytest.mark.parametrize("name", FORMATS)
def test_every_magnitude_keeps_its_precision(name: str, power: int) -> None:
    fmt = FORMATS[name]
    x = (1 + torch.rand(300, generator=torch.Generator().manual_seed(2))) * 2.0**power
    x[0] = torch.finfo(torch.float32).max if power == 127 else 2.0**power
    data, exponent = encode_state(x, fmt)
    got = decode_state(data, exponent, fmt, torch.float32)
    assert data.dtype == fmt.storage and exponent.dtype == torch.int16 and got.isfinite().all()
    bound = 2.0 ** -fmt.element.fraction_bits if power == 127 else \
        2.0 ** -(fmt.element.fraction_bits + 1)
    assert ((got.double() - x.double()).abs() <= x.double() * bound).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (255,), (257,), (3, 5, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_what_was_decoded_encodes_to_itself(name: str, dtype: torch.dtype,
                                            shape: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).abs().to(torch.float64)
    x = (x * torch.exp2(torch.rand(shape, generator=generator) * -30)).to(dtype)
    once = decode_state(*encode_state(x, fmt), fmt, dtype)
    assert once.shape == x.shape and once.dtype == dtype
    for random in (None, generator):
        assert torch.equal(decode_state(*encode_state(once, fmt, random), fmt, dtype), once)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_inf_stay_where_they_are(name: str, stochastic: bool) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator() if stochastic else None
    x = torch.linspace(0.5, 1.0, 600)
    x[[3, 300]], x[5], x[9] = torch.nan, torch.inf, 0.0
    if not fmt.unsigned:
        x[7] = -torch.inf
    got = decode_state(*encode_state(x, fmt, generator), fmt, torch.float32)
    for what in (torch.isnan, torch.isposinf, torch.isneginf, torch.logical_not):
        assert torch.equal(what(got), what(x))
    rest = x.isfinite()
    assert (got - x)[rest].abs().max() <= 2.0 ** -fmt.element.fraction_bits
    assert decode_state(*encode_state(torch.full((3,), torch.nan), fmt), fmt,
                        torch.float32).isnan().all()


@pytest.mark.parametrize("name", FORMATS)
def test_zero_is_exact_and_a_positive_square_never_zero(name: str) -> None:
    fmt = FORMATS[name]
    zero = torch.zeros(300)
    assert torch.equal(decode_state(*encode_state(zero, fmt), fmt, torch.float32), zero)
    small = torch.tensor([1.0, 2.0**-149, 1e-30])
    if fmt.unsigned:
        assert (decode_state(*encode_state(small, fmt), fmt, torch.float32) > 0).all()
        wrong = decode_state(*encode_state(-small, fmt), fmt, torch.float32)
        assert wrong.isnan().all()  # loud: a square is not negative


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(4)
    ulp = 2.0 ** -fmt.element.fraction_bits
    x = torch.full((1 << 16,), 1.0 + 0.3 * ulp)
    got = decode_state(*encode_state(x, fmt, generator), fmt, torch.float32)
    assert sorted(set(got.tolist())) == [1.0, 1.0 + ulp]
    assert abs((got.mean().item() - 1.0) / ulp - 0.3) < 0.01
    again = encode_state(x, fmt, torch.Generator().manual_seed(4))[0]
    assert torch.equal(again, encode_state(x, fmt, torch.Generator().manual_seed(4))[0])


# --- training ------------------------------------------------------------------------------------

# Relative to the loss of float32 state. The largest of four seeds and optimizers is 0.06 %, 0.65 %,
# 5.4 % and 5.1 %; what eight bits change is noise of either sign.
BOUNDS = {"fp16": 0.01, "bf16": 0.01, "fp8": 0.1, "fp8+": 0.1}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
def test_training_reaches_the_loss_of_float_state(name: str, kind: str) -> None:
    def final(scaled: bool) -> float:
        model, loss = problem()
        optimizer = OPTIMIZERS[name](model.parameters())
        if scaled:
            attached(optimizer, kind)
        return train(optimizer, loss, 200)

    expected, got = final(False), final(True)
    assert abs(got / expected - 1) <= BOUNDS[kind]


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_with_small_state(name: str, kind: str) -> None:
    model, loss = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    state = attached(optimizer, kind)
    start = loss().item()
    assert train(optimizer, loss, 60) < start
    assert state.left == {}
    for param in model.parameters():
        shaped = [v for v in optimizer.state[param].values() if v.shape == param.shape]
        assert shaped and all(v.element_size() <= 2 for v in shaped)


@pytest.mark.parametrize("name", ["adamw-foreach", "adamw-fused", "sgd-foreach", "sgd-fused"])
def test_implementations_see_the_same_state(name: str) -> None:
    """One decoded step of each is what the optimizer alone computes from that state."""
    model, loss = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    state = scaled_state(optimizer)
    train(optimizer, loss, 5)
    before = [param.detach().clone() for param in model.parameters()]
    plain = OPTIMIZERS[name](copies := [torch.nn.Parameter(p.clone()) for p in before])
    for copy, param in zip(copies, model.parameters(), strict=True):
        copy.grad = param.grad
        plain.state[copy] = {k: v.clone() for k, v in state.decoded(param).items()}
    optimizer.step()
    plain.step()
    assert same(model.parameters(), copies)


def test_nbytes() -> None:
    param = torch.nn.Parameter(torch.randn(512, 512))
    sizes: dict[str, float] = {}
    for kind in ("float32", *BOUNDS):
        optimizer = torch.optim.AdamW([param])
        state = scaled_state(optimizer) if kind == "float32" else attached(optimizer, kind)
        if kind == "float32":
            state.remove()
        param.grad = torch.randn(512, 512)
        optimizer.step()
        sizes[kind] = (state.nbytes - 4) / param.numel()  # 4: the step counter
    blocks = 2 / 256
    assert sizes == pytest.approx({"float32": 8, "fp16": 4, "bf16": 4, "fp8": 3 + blocks,
                                   "fp8+": 2 + 2 * blocks}, abs=1e-4)


def test_state_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as all at once; no more than ``AT_ONCE`` values are decoded at a time."""
    def run(at_once: int, watch: bool) -> tuple[list[Tensor], int]:
        monkeypatch.setattr(entries, "AT_ONCE", at_once)
        model, loss = problem()
        first, *others = model.parameters()
        optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 1e-2}])
        generator = torch.Generator().manual_seed(5)
        state = scaled_state(optimizer, generator=generator)
        most = 0
        if watch:
            inner = torch.optim.AdamW.step.__wrapped__  # type: ignore[attr-defined]

            def spy(self: Any) -> Any:
                nonlocal most
                most = max(most, sum("exp_avg" in entry for entry in self.state.values()))
                return inner(self)

            monkeypatch.setattr(torch.optim.AdamW.step, "__wrapped__", spy)
        else:
            optimizer.register_step_pre_hook(lambda *_: None)  # later than ours: all at once
        train(optimizer, loss, 4)
        assert state.left == {} and len(optimizer.param_groups) == 2
        return [*model.parameters()], most

    whole, _ = run(1 << 24, False)
    parts, most = run(1, True)
    assert same(whole, parts) and most == 1


def test_a_later_hook_sees_gradients_before_the_update() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scaled_state(optimizer)
    optimizer.register_step_pre_hook(
        lambda opt, *_: [p.grad.zero_() for g in opt.param_groups for p in g["params"]] and None)
    before = [p.detach().clone() for p in model.parameters()]
    train(optimizer, loss, 2)
    assert same(before, model.parameters())


def test_closure_and_schedule() -> None:
    def run(parts: bool) -> list[Tensor]:
        model, loss = problem()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scaled_state(optimizer)
        if not parts:
            optimizer.register_step_pre_hook(lambda *_: None)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        seen: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            seen.append(value.item())
            return value

        for _ in range(5):
            assert optimizer.step(closure).item() == seen[-1]
            schedule.step()
        optimizer.step(closure=closure)
        assert len(seen) == 6
        return [*model.parameters()]

    assert same(run(True), run(False))


# --- range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_gradients_of_any_size(kind: str, size: float) -> None:
    """What float32 state holds is held; nothing finite becomes Inf, or 0, or NaN."""
    generator = torch.Generator().manual_seed(6)
    grad = (torch.rand(40, 30, generator=generator) + 0.5) * size
    results: list[dict[str, Any]] = []
    for scaled in (False, True):
        optimizer, param = single(grad, lr=1e-3)
        state = attached(optimizer, kind) if scaled else None
        for _ in range(3):
            optimizer.step()
        results.append((state.decoded(param) if state else optimizer.state[param])
                       | {"param": param.detach()})
    expected, got = results
    assert torch.equal(got["step"], torch.tensor(3.0))
    for name, bound in (("exp_avg", 0.2), ("exp_avg_sq", 0.3), ("param", 0.3)):
        for what in (torch.isfinite, torch.isinf, torch.logical_not):
            assert torch.equal(what(got[name]), what(expected[name])), name
        finite = expected[name].isfinite()
        error = (got[name] - expected[name])[finite].abs()
        assert (error <= bound * expected[name][finite].abs()).all(), name


@pytest.mark.parametrize("kind", BOUNDS)
def test_zero_gradients_and_zero_state(kind: str) -> None:
    optimizer, param = single(torch.zeros(300))
    state = attached(optimizer, kind)
    optimizer.step()
    assert torch.equal(param, torch.zeros(300))
    assert all(v.eq(0).all() for k, v in state.decoded(param).items() if k != "step")


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_do_not_poison_others(kind: str, bad: float) -> None:
    def run(poisoned: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        params = [torch.nn.Parameter(torch.zeros(8)) for _ in range(2)]
        optimizer = torch.optim.Adam(params)
        state = attached(optimizer, kind)
        for step in range(3):
            for param in params:
                param.grad = torch.linspace(0.5, 1.0, 8)
            if poisoned and step == 1:
                params[0].grad[2] = bad
            optimizer.step()
        return params[0].detach(), params[1].detach(), state.decoded(params[0])

    sick, well, state = run(True)
    sick_before, well_before, _ = run(False)
    assert torch.equal(well, well_before)
    rest = torch.arange(8) != 2
    assert torch.equal(sick[rest], sick_before[rest]) and sick[2].isnan()
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name][rest].isfinite().all() and not state[name][2].isfinite()


def test_a_small_gradient_next_to_a_large_one_keeps_its_step() -> None:
    """Squares span 2^60 here: in float16 the small ones would be 0, and the steps huge."""
    grad = torch.tensor([1.0, 2.0**-15, 2.0**-30])
    optimizer, param = single(grad, lr=1e-3, eps=1e-12)
    scaled_state(optimizer)
    for _ in range(10):
        optimizer.step()
    assert torch.allclose(param, torch.full((3,), -1e-2), rtol=0.02)


# --- stalling ------------------------------------------------------------------------------------


def decayed(dtype: str, generator: torch.Generator | None, second: str | None = None) -> float:
    """√v after gradients fall from 1 to 0 for 1000 steps at β₂ = 0.999, against float32's."""
    optimizer, param = single(torch.ones(512), betas=(0.9, 0.999))
    state = scaled_state(optimizer, dtype, second=second, generator=generator)
    optimizer.step()
    optimizer.state[param].clear()
    v = torch.linspace(1.0, 2.0, 512)
    optimizer.state[param] |= {"step": torch.tensor(1000.0), "exp_avg": torch.zeros(512),
                               "exp_avg_sq": v.clone()}
    param.grad = torch.zeros(512)
    for _ in range(1000):
        optimizer.step()
    return (state.decoded(param)["exp_avg_sq"] / (v * 0.999**1000)).sqrt().mean().item()


def test_bf16_squares_stall_to_nearest_and_not_stochastically() -> None:
    generator = torch.Generator().manual_seed(8)
    nearest, stochastic = decayed("bf16", None), decayed("bf16", generator)
    fp16, eight = decayed("fp16", None), decayed("fp8", generator, "fp8")
    assert nearest > 1.6  # it did not move: e^½ of what it should be
    assert abs(stochastic - 1) < 0.02 and abs(fp16 - 1) < 0.1 and abs(eight - 1) < 0.05


def test_the_public_name() -> None:
    assert scaleprop.optim is optim and "optim" in scaleprop.__all__


def test_eight_bits_for_squares_need_a_generator() -> None:
    with pytest.raises(ConfigError, match="pass a generator"):
        scaled_state(single(torch.ones(3))[0], "fp8", second="fp8")
