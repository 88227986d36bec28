"""bfloat16 weights with stochastic rounding: odds, steps against a float32 reference, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from scaleprop import optim
from scaleprop.errors import ConfigError
from scaleprop.formats.elements import element
from scaleprop.formats.random import random_bits
from scaleprop.formats.rounding import Rounding, stochastic
from scaleprop.optim import entries, round_stochastic, scaled_state, stochastic_weights

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2),
}
SHAPES = {"muon": [(12, 20), (33, 5)]}


def parameters(name: str = "", dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES.get(name, [(12, 20), (7,), (), (3, 4, 5), (0, 4)])
    return [torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16().to(dtype))
            for s in shapes]


def gradients(params: list[torch.nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).bfloat16() for p in params]


def give(params: list[torch.nn.Parameter], step: int) -> None:
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g.to(p.dtype)


def drawn(shape: torch.Size, seed: int, index: int, step: int) -> Tensor:
    rows = shape[0] if shape else 1
    numbers = random_bits((rows, math.prod(shape[1:])), seed, index, step, 16)
    return numbers.reshape(shape)


def reference(name: str, steps: int, seed: int,
              attach: Callable[[torch.optim.Optimizer], object] | None = None) -> list[Tensor]:
    """float32 parameters that are rounded to bfloat16 values after each step, one by one."""
    params = parameters(name, torch.float32)
    optimizer = OPTIMIZERS[name](params)
    if attach:
        attach(optimizer)
    for step in range(steps):
        give(params, step)
        optimizer.step()
        for index, p in enumerate(params):
            if p.numel():
                bits = drawn(p.shape, seed, index, step)
                p.data = round_stochastic(p.detach(), bits).float()
    return [p.detach().bfloat16() for p in params]


def equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- rounding ------------------------------------------------------------------------------------


def test_odds_are_the_16_lowest_bits_exactly() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.0, 1.0 + 2**-23, 1.003, -3.14159, 2.0 - 2**-23, 1e-40, -1e30, 0.0):
        x = torch.full(bits.shape, value, dtype=torch.float32)
        low = int(x[:1].view(torch.int32)) & 0xFFFF
        rounded = round_stochastic(x, bits).float().abs()
        lower = float(torch.tensor(int(x[:1].abs().view(torch.int32)) & -65536,
                                   dtype=torch.int32).view(torch.float32))
        assert int((rounded > lower).sum()) == low
        assert set(rounded.unique().tolist()) <= {lower, float(rounded.max())}
        assert float(rounded.double().mean()) == pytest.approx(abs(float(x[0])), rel=1e-9)


def test_equal_to_stochastic_rounding_of_the_element() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-44, 38, (4000,),
                                                                      generator=generator)
    bits = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    expected = stochastic(x, element("bf16"), Rounding("stochastic", 16), bits)
    assert torch.equal(round_stochastic(x, bits).float(), expected)


def test_what_is_finite_stays_finite_and_the_rest_as_it_is() -> None:
    most = torch.full((3,), (1 << 16) - 1, dtype=torch.int32)
    top = torch.finfo(torch.bfloat16).max
    x = torch.tensor([3.4e38, -3.4e38, top])
    assert round_stochastic(x, most).tolist() == [top, -top, top]
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    found = round_stochastic(payloads, most)
    assert found[:2].isnan().all() and found[2] == math.inf


def test_other_dtypes_and_shapes_are_refused() -> None:
    for x, bits in ((torch.ones(2).double(), torch.zeros(2, dtype=torch.int32)),
                    (torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.zeros(3).int())):
        with pytest.raises(ConfigError, match="float32 and int32 of one shape"):
            round_stochastic(x, bits)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_steps_are_float32_steps_rounded_with_known_numbers(name: str) -> None:
    params = parameters(name)
    places = [p.data_ptr() for p in params]
    optimizer = OPTIMIZERS[name](params)
    weights = stochastic_weights(optimizer, seed=5)
    for step in range(4):
        give(params, step)
        grads = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert equal([p.detach() for p in params], reference(name, 4, 5))
    assert places == [p.data_ptr() for p in params] and weights.steps == 4
    assert all(p.dtype == torch.bfloat16 for p in params)
    floating = [v for entry in optimizer.state.values() for v in entry.values()
                if isinstance(v, Tensor) and v.ndim]
    assert all(v.dtype == torch.float32 for v in floating)
    assert set(optimizer.state) <= set(params)


def test_the_mean_of_a_million_draws_is_the_float32_step() -> None:
    """1 - 0.1·0.0123 lies 0.315 of the way from one bfloat16 number to the next."""
    param = torch.nn.Parameter(torch.ones(1000, 1000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=0.1)
    stochastic_weights(optimizer)
    param.grad = torch.full_like(param, 0.0123)
    optimizer.step()
    exact = 1.0 - 0.1 * float(param.grad[0, 0])
    ulp = 2.0**-8
    odds = (exact - math.floor(exact / ulp) * ulp) / ulp
    error = ulp * math.sqrt(odds * (1 - odds) / param.numel())
    assert abs(float(param.detach().double().mean()) - exact) < 4 * error
    assert len(param.detach().unique()) == 2


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_small_steps_are_lost_to_nearest_and_kept_by_stochastic_rounding(name: str) -> None:
    """Steps of 1/1024, a quarter of a unit in the last place below 1; 256 of them are 1/4."""
    ends = {}
    for rounded in ("nearest", "stochastic"):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
        optimizer = make([param], lr=1 / 1024)
        if rounded == "stochastic":
            stochastic_weights(optimizer)
        for _ in range(256):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[rounded] = float(param.detach().double().mean())
    assert ends["nearest"] == 1.0
    # the deviation of one weight is at most √256·ulp/2; of the mean of 4096, 1/64 of that
    assert abs(ends["stochastic"] - 0.75) < 4 * 16 * 2.0**-9 / 64


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for at_once in (1, 60, 1 << 24):
        monkeypatch.setattr(entries, "AT_ONCE", at_once)
        params = parameters()
        optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}],
                                      lr=1e-2)
        stochastic_weights(optimizer, seed=5)
        for step in range(3):
            give(params, step)
            optimizer.step()
        expected = reference("adamw-foreach", 3, 5)
        assert equal([p.detach() for p in params], expected)
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]


def test_other_hooks_see_one_step_of_all_parameters() -> None:
    params, seen = parameters(), []
    optimizer = OPTIMIZERS["adam"](params)
    stochastic_weights(optimizer, seed=5)
    optimizer.register_step_pre_hook(
        lambda o, *_: seen.append([p.dtype for p in o.param_groups[0]["params"]]))
    for step in range(3):
        give(params, step)
        optimizer.step()
    assert equal([p.detach() for p in params], reference("adam", 3, 5))
    assert seen == [[torch.float32] * 5] * 3


def test_large_parameters_are_rounded_as_a_whole_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((40, 3000), (100_000,), (2, 70_000)):
        param = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([param], lr=1e-3)
        stochastic_weights(optimizer, seed=3)
        param.grad = torch.ones_like(param)
        optimizer.step()
        expected = round_stochastic(torch.ones(shape) - 1e-3, drawn(param.shape, 3, 0, 0))
        assert torch.equal(param.detach(), expected)


def test_float32_parameters_are_stepped_as_before_and_missing_gradients_left_alone() -> None:
    mixed = [torch.nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16)),
             torch.nn.Parameter(torch.ones(8)),
             torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    plain = torch.nn.Parameter(torch.ones(8))
    optimizer, other = torch.optim.AdamW(mixed, lr=1e-3), torch.optim.AdamW([plain], lr=1e-3)
    stochastic_weights(optimizer)
    for _ in range(3):
        mixed[0].grad = torch.ones_like(mixed[0])
        mixed[1].grad, plain.grad = torch.ones(8), torch.ones(8)
        optimizer.step()
        other.step()
    assert torch.equal(mixed[1], plain)
    assert torch.equal(mixed[2].detach(), torch.ones(8, dtype=torch.bfloat16))
    assert mixed[2] not in optimizer.state


def test_channels_last_weights_have_the_same_numbers() -> None:
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        value = torch.ones(8, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=layout)
        param = torch.nn.Parameter(value)
        optimizer = torch.optim.SGD([param], lr=1e-3)
        stochastic_weights(optimizer)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.is_contiguous(memory_format=layout)
        ends.append(param.detach().contiguous())
    assert torch.equal(*ends)


def test_a_closure_sees_bfloat16_weights_once() -> None:
    params, seen = parameters("muon"), []
    optimizer = OPTIMIZERS["adam"](params)
    stochastic_weights(optimizer)

    def closure() -> Tensor:
        seen.append([p.dtype for p in optimizer.param_groups[0]["params"]])
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert float(optimizer.step(closure=closure)) > 0
    assert seen == [[torch.bfloat16] * 2] * 2


def test_a_step_that_fails_leaves_weights_groups_and_state() -> None:
    class Failing(torch.optim.SGD):
        fail = False

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fail:
                raise RuntimeError("on purpose")

    params = parameters()
    optimizer = Failing(params, lr=0.1, momentum=0.9)
    stochastic_weights(optimizer, seed=5)
    give(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.step()
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3, 4}
    assert equal([p.detach() for p in params], before)
    assert optimizer.param_groups[0]["params"][0] is params[0]


# --- together with scaled state, saved and resumed -----------------------------------------------


@pytest.mark.parametrize("order", ["weights first", "state first"])
@pytest.mark.parametrize("name", ["adam", "adamw-foreach", "momentum", "muon"])
def test_with_scaled_state_in_either_order(name: str, order: str) -> None:
    params = parameters(name)
    optimizer = OPTIMIZERS[name](params)
    attach = [lambda: stochastic_weights(optimizer, seed=5), lambda: scaled_state(optimizer)]
    for each in attach if order == "weights first" else reversed(attach):
        each()
    for step in range(4):
        give(params, step)
        optimizer.step()
        moments = [v for entry in optimizer.state.values() for k, v in entry.items()
                   if isinstance(v, Tensor) and v.ndim and not k.endswith("exponent")]
        assert moments and all(v.element_size() == 2 for v in moments)
    assert equal([p.detach() for p in params], reference(name, 4, 5, scaled_state))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["adam", "nadam", "adagrad", "momentum", "muon"])
def test_a_resumed_run_is_the_same_run(name: str, scaled: bool) -> None:
    def start() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer, Any]:
        params = parameters(name)
        optimizer = OPTIMIZERS[name](params)
        weights = stochastic_weights(optimizer, seed=9)
        if scaled:
            scaled_state(optimizer)
        return params, optimizer, weights

    params, optimizer, weights = start()
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            values = [p.detach().clone() for p in params]
        give(params, step)
        optimizer.step()
    again, other, resumed = start()
    resumed.seed = 0  # the saved one counts
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(again, values, strict=True):
            p.copy_(value)
    assert (resumed.seed, resumed.steps) == (9, 3)
    for step in range(3, 6):
        give(again, step)
        other.step()
    assert equal(params, again) and resumed.steps == weights.steps == 6
    assert equal([v for e in optimizer.state_dict()["state"].values() for v in e.values()
                  if isinstance(v, Tensor)],
                 [v for e in other.state_dict()["state"].values() for v in e.values()
                  if isinstance(v, Tensor)])


def test_state_from_before_is_widened_and_remove_leaves_an_ordinary_optimizer() -> None:
    params = parameters()
    optimizer = OPTIMIZERS["adam"](params)
    give(params, 0)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    weights = stochastic_weights(optimizer)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    optimizer.step()
    weights.remove()
    stochastic_weights(optimizer).remove()
    assert "stochastic_weights" not in optimizer.state_dict()


def test_a_gradient_scaler_skips_overflow_and_unscales_the_rest() -> None:
    model = torch.nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights = stochastic_weights(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = model.weight.detach().clone()
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4).bfloat16()).float().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weights.steps == int(factor == 1.0)
        assert torch.equal(model.weight.detach(), before) == (factor == math.inf)
    assert scaler.get_scale() == 2.0**9


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.to\(torch\.bfloat16\)"):
        stochastic_weights(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]))
    params = parameters()
    with pytest.raises(ConfigError, match="LBFGS"):
        stochastic_weights(torch.optim.LBFGS(params))
    with pytest.raises(ConfigError, match="not int"):
        stochastic_weights(3)
    optimizer = torch.optim.SGD(params)
    for seed in (-1, 1 << 32):
        with pytest.raises(ConfigError, match="seed"):
            stochastic_weights(optimizer, seed)
    with pytest.raises(ConfigError, match="differentiable=False"):
        stochastic_weights(torch.optim.SGD(params, differentiable=True))
    stochastic_weights(optimizer)
    with pytest.raises(ConfigError, match="already"):
        stochastic_weights(optimizer)
    old = torch.optim.Adam(params)
    give(params, 0)
    old.step()
    scaled_state(old, "fp8")
    with pytest.raises(ConfigError, match="scaled_state again"):
        stochastic_weights(old)
    assert optim.StochasticWeights


def test_tensor_subclasses_are_refused() -> None:
    class Odd(Tensor):
        pass

    odd = torch.ones(2, 32, dtype=torch.bfloat16).as_subclass(Odd).requires_grad_()
    with pytest.raises(ConfigError, match="plain tensors"):
        stochastic_weights(torch.optim.SGD([odd]))
