"""Two ranges: one number at a time, the best power, what stays with one range."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.two_ranges import TwoRanges, two_ranges
from scaleprop.recipes import Recipe, Role

from .small import calibrated, error

TENSOR = Recipe(name="tensor", description="", roles={
    "fprop.x": Role(format="int4[tensor]*f32"), "fprop.w": Role(format="int8[row]*f32")})


def slow(x: float, step: float, power: int, levels: int) -> float:
    if x >= 0:
        return min(round(x / step), levels) * step
    fine = step / 2**power
    return max(round(x / fine), -levels - 1) * fine


def test_each_number_lies_on_its_grid():
    x = torch.linspace(-1.3, 9, 501).double()
    got = two_ranges(x, 0.5, 3, 7).tolist()
    assert got == pytest.approx([slow(value, 0.5, 3, 7) for value in x.tolist()])
    assert len(set(got)) == 16  # 8 of each: 4 bits, 0 counted once


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()


ROWS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 3


def test_the_power_is_that_of_least_error():
    net, method = model(), TwoRanges()
    found = method.run(calibrated(net, [ROWS], TENSOR, method))
    assert any("1 operands" in note for note in found.notes)  # not the input, which is symmetric
    with torch.no_grad():
        x = net[1](net[0](ROWS))
        errors = {}
        for power in range(9):
            step = float(x.max()) / 7
            rounded = x.double().clone().apply_(lambda v, p=power, s=step: slow(v, s, p, 7))
            errors[power] = float(((rounded - x) @ net[2].weight.double().mT).square().sum())
        best = min(errors, key=lambda power: errors[power])
    (node,) = [node for node in found.program.module.graph.nodes
               if node.target is torch.ops.aten.add.Tensor]  # fmt: skip
    assert node.meta["scaleprop"].why == f"two ranges, steps 2^{best} apart" and best > 0
    limits = {node.args[1:] for node in found.program.module.graph.nodes
              if node.target is torch.ops.aten.clamp.default}  # fmt: skip
    assert limits == {(0, 7), (-8, 0)}


def test_errors_fall_and_it_compiles():
    net, narrow = model(), model()[1:]
    x = ROWS.repeat(1, 2) / 3
    assert error(narrow, [x], TENSOR, "two-ranges") < 0.8 * error(narrow, [x], TENSOR)
    compiled = scaleprop.compile(net, ROWS, recipe=TENSOR, backend="onnxruntime",
                                 calibration=[ROWS], passes=["two-ranges"])
    reference = scaleprop.compile(net, ROWS, recipe=TENSOR, backend="reference",
                                  calibration=[ROWS], passes=["two-ranges"])
    torch.testing.assert_close(compiled(ROWS), reference(ROWS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8[row]*f32", "e4m3[tensor]*f32"])
def test_other_formats_keep_theirs(name):
    method = TwoRanges()
    recipe = Recipe(name="r", description="", roles={
        "fprop.x": Role(format=name), "fprop.w": Role(format="int8[row]*f32")})  # fmt: skip
    assert not method.run(calibrated(model(), [ROWS], recipe, method)).modified


@pytest.mark.parametrize("options", [{"asymmetry": 0.5}, {"powers": -1}])
def test_refusals(options):
    with pytest.raises(ConfigError, match="at least"):
        TwoRanges(**options)
