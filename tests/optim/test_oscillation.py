"""Oscillating weights: sums against a scalar reference, resets into the middle of intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from scaleprop import optim
from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import fake_quantize

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GRID = sorted({*E2M1, *(-v for v in E2M1)})


def anchored(values: list[float]) -> Tensor:
    """One row of e2m1 with scale 1: a 6 holds the amax."""
    return torch.tensor([[6.0, *values]])


def watched(values: list[float], **options) -> tuple[Tensor, optim.Oscillation]:
    weight = torch.nn.Parameter(anchored(values))
    return weight, optim.Oscillation([weight], "e2m1[row]*f32", **options)


def move(weight: Tensor, values: list[float]) -> None:
    with torch.no_grad():
        weight.copy_(anchored(values))


def round_(value: float) -> float:
    """Nearest value of E2M1; no ties here."""
    return min(GRID, key=lambda v: abs(v - value))


def test_ratios_are_the_sums_of_a_scalar_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    path = [(torch.rand(5, generator=generator) * 11 - 5.5).tolist() for _ in range(20)]
    weight, oscillation = watched(path[0], every=1000)
    for values in path[1:]:
        move(weight, values)
        oscillation.step()
    for index in range(5):
        moved = sum(abs(b[index] - a[index]) for a, b in itertools.pairwise(path))
        jumped = sum(abs(round_(b[index]) - round_(a[index])) for a, b in itertools.pairwise(path))
        assert float(oscillation.ratios[0][0, index + 1]) == pytest.approx(jumped / moved, rel=1e-5)
    assert float(oscillation.ratios[0][0, 0]) == 0.0  # it did not move
    assert torch.equal(weight.detach(), anchored(path[-1]))


def swing(weight: Tensor, oscillation: optim.Oscillation, steps: int) -> None:
    """Element 1 swings around 2.5, the boundary of 2 and 3; element 2 travels from 0 to 1."""
    for step in range(1, steps + 1):
        move(weight, [2.51 if step % 2 else 2.49, step / steps, -0.2])
        oscillation.step()


def test_what_swings_comes_to_rest_in_the_middle_of_its_interval() -> None:
    weight, oscillation = watched([2.49, 0.0, -0.2], every=10, ratio=16)
    swing(weight, oscillation, 9)
    assert float(oscillation.ratios[0][0, 1]) == pytest.approx(1 / 0.02, rel=1e-3)
    assert float(oscillation.ratios[0][0, 2]) == pytest.approx(1.0, rel=0.6)
    swing(weight, oscillation, 1)  # 2.51 on the tenth step: the value 3, from 2.5 to 3.5
    assert torch.equal(weight.detach(), anchored([3.0, 1.0, -0.2]))
    assert float(oscillation.shares[0]) == 0.25
    assert all(not bool(r.any()) for r in oscillation.ratios)
    assert oscillation.steps == 10


@pytest.mark.parametrize(("value", "middle"), [
    (2.51, 3.0), (2.49, 2.125), (1.76, 2.125), (3.51, 4.25), (4.99, 4.25), (5.01, 6.0),
    (0.24, 0.0), (0.26, 0.5), (-1.74, -1.5), (-5.01, -6.0)])
def test_the_middle_of_every_kind_of_interval(value: float, middle: float) -> None:
    """Of uneven ones (from 1.75 to 2.5, from 3.5 to 5); the last have no end: their value."""
    side = min((abs(a + b) / 2 for a, b in itertools.pairwise(GRID)),
               key=lambda edge: abs(edge - abs(value)))
    other = math.copysign(2 * side - abs(value), value)
    weight, oscillation = watched([other], every=8)
    for step in range(1, 9):
        move(weight, [other if step % 2 else value])
        oscillation.step()
    assert weight[0, 1] == middle
    assert round_(middle) == round_(value)


def test_toward_ema_takes_the_value_that_the_average_is_nearer_to() -> None:
    """Three steps of four at 2.45, one at 2.55: it ends at 2.55, but belongs to 2."""
    ends = {}
    for toward in ("centre", "ema"):
        weight, oscillation = watched([2.45], every=16, ratio=1.5, toward=toward, decay=0.9)
        for step in range(1, 17):
            move(weight, [2.55 if step % 4 == 0 else 2.45])
            oscillation.step()
        ends[toward] = float(weight[0, 1])
    assert ends == {"centre": 3.0, "ema": 2.125}


def test_an_average_far_away_chooses_among_neighbours_only() -> None:
    weight, oscillation = watched([-4.0], every=5, ratio=1e-3, toward="ema", decay=0.99)
    for value in (2.45, 2.55, 2.45, 2.55, 2.55):
        move(weight, [value])
        oscillation.step()
    assert float(weight[0, 1]) == 2.125  # of 2 and 3, that nearer to about -4


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvfp4_2d", "int4[row]*f32", "nf4", "fp8",
                                 "int8[channel]*f32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reset_keeps_the_quantized_weight(fmt: str, axis: int) -> None:
    """Every weight is put to rest, by a ratio that all exceed: x̂ stays what it was."""
    weight = torch.nn.Parameter(torch.randn(40, 48))
    oscillation = optim.Oscillation([weight], fmt, axis=axis, ratio=1e-9, every=1)
    with torch.no_grad():
        weight.mul_(1.5).add_(torch.randn(40, 48) * 0.3)
    before = weight.detach().clone()
    value = fake_quantize(before, fmt, axis)
    oscillation.step()
    rest = weight.detach()
    assert float(oscillation.shares[0]) > 0.5
    after = fake_quantize(rest, fmt, axis)
    agree = (after - value).abs() <= 1e-5 * value.abs() + 1e-7
    assert float(agree.float().mean()) > (0.99 if fmt.startswith("int") else 0.9)


def test_training_with_it_swings_less() -> None:
    """Noisy descent to a target between two values: with resets, fewer jumps of the last 200."""
    jumps = {}
    for ratio in (4.0, math.inf):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(anchored([2.4] * 64))
        oscillation = optim.Oscillation([weight], "e2m1[row]*f32", ratio=ratio, every=25)
        count, last = 0, fake_quantize(weight.detach(), "e2m1[row]*f32")
        for _ in range(200):
            noise = 0.02 * torch.randn(1, 65, generator=generator)
            quantized = fake_quantize(weight.detach(), "e2m1[row]*f32")
            gradient = (quantized - anchored([2.5] * 64)) + noise
            gradient[0, 0] = 0
            with torch.no_grad():
                weight.sub_(0.05 * gradient)
            now = fake_quantize(weight.detach(), "e2m1[row]*f32")
            count += int((now != last).sum())
            last = now
            oscillation.step()
        jumps[ratio] = count
    assert jumps[4.0] < 0.7 * jumps[math.inf]


def test_saved_and_resumed_it_goes_on_the_same() -> None:
    weight, oscillation = watched([2.49, 0.0, -0.2], every=10, toward="ema")
    swing(weight, oscillation, 4)
    copy, resumed = watched([0.0, 0.0, 0.0], every=10, toward="ema")
    saved = {key: [x.clone() for x in value] if isinstance(value, list) else value
             for key, value in oscillation.state_dict().items()}
    resumed.load_state_dict(saved)
    move(copy, weight.detach()[0, 1:].tolist())
    for w, o in ((weight, oscillation), (copy, resumed)):
        swing(w, o, 6)
    assert oscillation.steps == resumed.steps == 10
    assert torch.equal(weight, copy)
    assert torch.equal(oscillation.shares[0], resumed.shares[0])


def test_bfloat16_parameters_stay_bfloat16() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 32).bfloat16())
    oscillation = optim.Oscillation([weight], "mxfp4", ratio=1e-9, every=1)
    with torch.no_grad():
        weight.mul_(1.25)
    oscillation.step()
    assert weight.dtype == torch.bfloat16 and oscillation.ratios[0].dtype == torch.float32


def test_what_makes_no_sense_is_refused() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 32))
    with pytest.raises(ConfigError, match="at least one"):
        optim.Oscillation([], "mxfp4")
    with pytest.raises(ConfigError, match="floating"):
        optim.Oscillation([torch.ones(3, dtype=torch.int32)], "mxfp4")
    with pytest.raises(ConfigError, match="zero point"):
        optim.Oscillation([weight], "int4+zp")
    with pytest.raises(FormatError, match="mxfp4"):
        optim.Oscillation([weight], "mxfp5")
    for options in ({"ratio": 0.0}, {"every": 0}, {"decay": 1.0}, {"ratio": math.nan}):
        with pytest.raises(ConfigError, match="ratio is above 0"):
            optim.Oscillation([weight], "mxfp4", **options)
    with pytest.raises(ConfigError, match="known: centre, ema"):
        optim.Oscillation([weight], "mxfp4", toward="mean")
    saved = optim.Oscillation([weight], "mxfp4").state_dict()
    with pytest.raises(ConfigError, match="same parameters"):
        optim.Oscillation([weight], "mxfp4", toward="ema").load_state_dict(saved)


def test_tensor_subclasses_are_refused() -> None:
    class Odd(Tensor):
        @staticmethod
        def __new__(cls) -> Odd:
            return torch.ones(2, 32).as_subclass(cls)

    with pytest.raises(ConfigError, match="plain tensors"):
        optim.Oscillation([Odd()], "mxfp4")
