"""LLM-FP4: shifts against the formula in loops, the formats that the data asks for, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize, parse
from scaleprop.passes.assign import Assignment, assignment_of
from scaleprop.passes.base import Program
from scaleprop.passes.methods.float_search import FloatSearch
from scaleprop.recipes.base import Recipe, Role
from tests.passes.methods.small import parameter, prepared

SIZE = 32


class Block(nn.Module):
    """A norm with a bias, then gate·up→down, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.gate, self.up = nn.Linear(SIZE, 48), nn.Linear(SIZE, 48, bias=False)
        self.down = nn.Linear(48, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Layer(nn.Module):
    """A norm and one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(SIZE), nn.Linear(SIZE, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def model_of(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 16, SIZE)
    with torch.no_grad():
        model.norm.weight.copy_(torch.logspace(0, 2, SIZE)[torch.randperm(SIZE)])
    return model, x


def recipe(weight: str, activation: str | None, scaling: str = "dynamic") -> Recipe:
    roles = {"fprop.w": Role(format=weight)}
    if activation is not None:
        roles["fprop.x"] = Role(format=activation, scaling=scaling)
    return Recipe(name="r", description="", roles=roles)


FP4 = recipe("e2m1[row]*f32", "e2m1[tensor]*f32", "static")


def assigned(program: Program) -> list[Assignment]:
    return [item for node in program.module.graph.nodes if (item := assignment_of(node))]


def test_channels_are_shifted_by_powers_of_two_up_to_the_largest():
    model, x = model_of(Layer)
    found = FloatSearch(shifts=(3,)).run(prepared(model, x, FP4)).program
    y = model.norm(x).detach().reshape(-1, SIZE)
    reach = [max(abs(float(v)) for v in y[:, j]) for j in range(SIZE)]
    shift = [min(max(round(math.log2(max(reach) / amax)), 0), 3) for amax in reach]
    assert {0, 3} < set(shift)
    factor = torch.tensor([2.0**b for b in shift])
    assert torch.equal(parameter(found, "norm.weight"), model.norm.weight.detach() * factor)
    assert torch.equal(parameter(found, "out.weight"), model.out.weight.detach() / factor)


def noise(y: Tensor, w: Tensor, formats: tuple[str, str], top: float, mse: bool) -> float:
    """The output's error with a static scale for ±top."""
    parsed = parse(formats[0])
    weight = parse(formats[1]).replace(rule="mse") if mse else parse(formats[1])
    scale = torch.tensor(top / parsed.element.max)
    got = fake_quantize(y, parsed, scales=[scale]) @ fake_quantize(w, weight).mT
    return float((got - y @ w.mT).square().sum())


def test_formats_and_ranges_are_the_best_of_those_tried():
    model, x = model_of(Layer)
    found = FloatSearch(shifts=(), clips=(1.0, 0.5)).run(prepared(model, x, FP4)).program
    [item] = assigned(found)
    y, w = model.norm(x).detach().reshape(-1, SIZE), model.out.weight.detach()
    top, names = float(y.abs().max()), ("e2m1", "e1m2", "e3m0")
    first = {name: noise(y, w, (f"{name}[tensor]*f32", "e2m1[row]*f32"), top, False)
             for name in names}  # activations first, all of their range
    chosen = min(first, key=lambda name: first[name])
    chosen_format = f"{chosen}[tensor]*f32"
    second = {share: noise(y, w, (chosen_format, "e2m1[row]*f32"), top * share, False)
              for share in (1.0, 0.5)}  # fmt: skip
    share = min(second, key=lambda part: second[part])
    third = {(name, mse): noise(y, w, (chosen_format, f"{name}[row]*f32"), top * share, mse)
             for name, mse in itertools.product(names, (False, True))}  # fmt: skip
    weight, mse = min(third, key=lambda key: third[key])
    assert item.activation is not None and item.weight is not None and item.extremes is not None
    assert parse(item.activation.format).element.name == chosen
    assert max(-item.extremes[0], item.extremes[1]) == pytest.approx(top * share)
    assert (parse(item.weight.format).element.name, item.weight.clipping == "mse") == (weight, mse)


@pytest.mark.parametrize(("exponent", "make"), [
    (1, lambda shape: torch.randint(-7, 8, shape) / 1.0),  # even steps
    (3, lambda shape: 2.0 ** -torch.randint(0, 7, shape) * (torch.rand(shape) - 0.5).sign()),
])  # fmt: skip
def test_weights_get_the_float_that_they_lie_on(exponent, make):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(SIZE, 16)).eval(), torch.randn(30, SIZE)
    with torch.no_grad():
        model[0].weight.copy_(make((16, SIZE)))
    found = FloatSearch().run(prepared(model, x, recipe("e2m1[row]*f32", None)))
    [item] = assigned(found.program)
    assert found.modified and item.weight is not None
    assert item.weight.format == f"e{exponent}m{3 - exponent}[row]*f32"
    assert item.activation is None and not found.program.transforms


@pytest.mark.parametrize("given", [FP4, "mxfp4", "fp8"])
def test_the_function_is_kept(given):
    model, x = model_of(Block)
    compiled = scaleprop.compile(model, x, given, "reference", calibration=[x],
                                 passes=["float-search"], verify=True)
    applied = [item for item in compiled.program.transforms if item.refused is None]
    assert applied and all(not item.runtime for item in applied)


def test_the_error_falls_and_onnxruntime_agrees():
    model, x = model_of(Block)
    with torch.no_grad():
        for layer in (model.gate, model.up):  # every channel counts
            layer.weight /= model.norm.weight
    want = model(x)
    error = []
    for passes in ([], ["float-search"]):
        compiled = scaleprop.compile(model, x, FP4, calibration=[x], passes=passes, verify=True)
        error.append(float((compiled(x) - want).norm() / want.norm()))
    assert error[1] < 0.6 * error[0]


def test_integers_and_rules_made_for_one_element_stay():
    model, x = model_of(Block)
    assert not FloatSearch().run(prepared(model, x, "int8")).modified
    made = recipe("nvfp4:fouroversix", None)
    found = FloatSearch().run(prepared(model, x, made)).program
    assert {parse(item.weight.format).element.name for item in assigned(found)
            if item.weight} == {"e2m1"}  # fmt: skip


@pytest.mark.parametrize(("options", "text"), [
    ({"exponents": (0,)}, "1 to 8"), ({"shifts": (-1,)}, "at least 0"), ({"clips": ()}, "shares"),
    ({"clips": (1.5,)}, "shares"),
])  # fmt: skip
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        FloatSearch(**options)
