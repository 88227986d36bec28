"""Smooth, then rotate: values by the papers' formulas, the choice, and what it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from scaleprop.calibration.channels import difficulty, relative_difficulty
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.smooth_rotate import SmoothRotate
from scaleprop.passes.transforms.transform import hadamard_rotation

from .small import calibrated, change_in_float64, error, gated, images, pictures, tokens


class Two(nn.Module):
    """A linear, and one that reads what a product of it and its input makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sigmoid(self.first(x)) * x)


def test_difficulty_is_the_papers() -> None:
    norms = torch.tensor([1.0, 2.0, 6.0])
    assert math.isclose(difficulty(norms), math.sqrt((4 + 1 + 9) / 2))
    assert math.isclose(relative_difficulty(norms), math.sqrt(7) / 3)
    assert relative_difficulty(torch.tensor([5.0])) == 0.0


def test_weights_are_smoothed_then_rotated() -> None:
    model = Two().eval()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    x[:, 4] *= 30
    method = SmoothRotate(choose="both")
    program = method.run(calibrated(model, [x], "int4-int4", method)).program
    found = {name: value.double() for name, value in program.module.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    first = hadamard_rotation(16, generator).matrix
    weight = model.first.weight.detach().double()
    s = torch.tensor([math.sqrt(float(x[:, j].abs().max()) / float(weight[:, j].abs().max()))
                      for j in range(16)]).double()
    want = torch.zeros(16, 16).double()
    for i in range(16):
        for j in range(16):
            want[i, j] = sum(weight[i, k] * s[k] * first[k, j] for k in range(16))
    torch.testing.assert_close(found["first.weight"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choose", ["error", "difficulty", "both"])
def test_the_function_stays(choose: Any) -> None:
    method = SmoothRotate(choose=choose)
    for model, inputs in ((gated(False), tokens()), (images(), pictures())):
        program = calibrated(model, inputs, "int4-int4", method)
        assert change_in_float64(program, method) < 1e-10


def test_the_best_of_them_is_chosen() -> None:
    for model, inputs in ((gated(False), tokens()), (images(), pictures())):
        chosen = error(model, inputs, "int4-int4", "smooth-rotate")
        assert chosen < error(model, inputs, "int4-int4") / 4
        assert chosen < error(model, inputs, "int4-int4", "smooth") * 1.1
        assert chosen < error(model, inputs, "int4-int4", "rotate")


def test_nothing_is_done_to_what_is_easy() -> None:
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (64, 16)) * 2.0 - 1
    model = nn.Linear(16, 8).eval()
    with torch.no_grad():
        model.weight.copy_(torch.randint(0, 2, (8, 16)) * 2.0 - 1)
    for choose in ("error", "difficulty"):  # neither has any error, or spread
        method = SmoothRotate(choose=choose)
        result = method.run(calibrated(model, [signs], "int4-int4", method))
        assert not result.modified


def test_without_runtime_nothing_runs() -> None:
    method = SmoothRotate(choose="both", runtime=False)
    model, inputs = gated(), tokens()
    program = method.run(calibrated(model, inputs, "int4-int4", method)).program
    applied = [record for record in program.transforms if record.refused is None]
    assert applied and not any(record.runtime for record in applied)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        SmoothRotate(alpha=1.5)
    with pytest.raises(ConfigError, match="margin"):
        SmoothRotate(margin=0.0)
