"""What is left at run time runs under Inductor too, and as the reference does."""

from __future__ import annotations

import pytest
import torch

import scaleprop
from scaleprop.passes.base import run_as_is

from .small import gated, tokens


@pytest.mark.parametrize("passes", [
    "fold-norms+rotate", "fold-norms+rotate+runtime-smooth", "rotate-pairs{steps=1,group=16}",
])  # fmt: skip
def test_it_equals_the_reference(passes):
    inputs = tokens(2)
    model = scaleprop.compile(gated(), (inputs[0],), recipe="int8-token", backend="inductor",
                              calibration=[(item,) for item in inputs], passes=passes.split("+"))
    assert any(item.runtime for item in model.program.transforms if item.refused is None)
    got, want = model(inputs[0]), run_as_is(model.program)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
