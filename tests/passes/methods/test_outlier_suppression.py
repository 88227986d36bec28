"""Outlier Suppression+: its shift and scale by the paper's formulas, and what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scaleprop.errors import ConfigError
from scaleprop.passes.methods.outlier_suppression import OutlierSuppression, thresholds
from scaleprop.passes.transforms.search import OutputError

from .small import calibrated, change_in_float64, error, gated, images, pictures, tokens, work


class Plain(nn.Module):
    """A norm and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, 1, 20, 1, 0.5, 1, 1, 2]))
            self.norm.bias.copy_(torch.tensor([0.0, 9, -4, 0, 0, 1, 0, 0]))

    def forward(self, x):
        x = self.norm(x)
        return self.a(x), self.b(x)


def test_values_are_the_papers():
    model, x = Plain().eval(), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    method = OutlierSuppression(steps=6)
    program = calibrated(model, [x], "int8-token", method)
    found = method.run(program).program
    values = dict(found.module.named_buffers()) | dict(found.module.named_parameters())
    with torch.no_grad():
        y = model.norm(x)
    z = [(max(y[:, j].tolist()) + min(y[:, j].tolist())) / 2 for j in range(8)]
    reach = [max(abs(float(value) - z[j]) for value in y[:, j]) for j in range(8)]
    # every threshold, one after the other; the error is that of the layer, shifted
    site = work(model, [x], "int8-token", method).sites()[0]
    measured = OutputError(work(model, [x], "int8-token", method), site)
    shift = torch.tensor(z).double()
    best = None
    for step in range(6):
        t = math.exp(math.log(max(reach)) * (1 - step / 5) + math.log(min(reach)) * step / 5)
        s = torch.tensor([max(1.0, r / t) for r in reach]).double()
        if best is None or measured(scale=1 / s, shift=shift) < best[0]:
            best = measured(scale=1 / s, shift=shift), s
    assert best is not None and best[1].max() > 2
    torch.testing.assert_close(values["norm.weight"].double(),
                               model.norm.weight.detach() / best[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values["norm.bias"].double(),
                               (model.norm.bias.detach() - shift) / best[1], rtol=1e-5, atol=1e-5)
    want = model.a.bias.detach() + model.a.weight.detach().double() @ shift
    torch.testing.assert_close(values["a.bias"].double(), want, rtol=1e-5, atol=1e-5)
    made = [value for name, value in values.items() if value.shape == (4,)]
    torch.testing.assert_close(made[0].double(), model.b.weight.detach().double() @ shift,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_thresholds_span_the_channels():
    found = thresholds(torch.tensor([4.0, 0.0, 1.0, 16.0]).double(), 5).tolist()
    assert found == pytest.approx([16, 8, 4, 2, 1])
    assert thresholds(torch.zeros(3).double(), 5).numel() == 0
    assert float(thresholds(torch.tensor([1.0, 1e-9]), 4)[-1]) == pytest.approx(2.0**-12)


@pytest.mark.parametrize("runtime", [True, False])
@pytest.mark.parametrize(("model", "inputs"), [
    (gated(rms=True), tokens()), (gated(rms=False), tokens()), (images(), pictures()),
], ids=["rms", "layer", "images"])  # fmt: skip
def test_the_function_stays(model, inputs, runtime):
    method = OutlierSuppression(steps=8, runtime=runtime)
    program = calibrated(model, inputs, "int8-token", method)
    assert method.run(program).modified
    assert change_in_float64(program, method) < 1e-10


def test_where_no_bias_takes_a_shift_it_runs_or_is_refused():
    model, inputs = gated(rms=True), tokens()
    for runtime in (True, False):
        method = OutlierSuppression(scale=False, runtime=runtime)
        found = method.run(calibrated(model, inputs, "int8-token", method)).program
        refused = [item.refused for item in found.transforms if item.refused]
        assert bool(refused)
        if not runtime:
            assert any("no bias to take a shift" in reason for reason in refused)
            assert not any(item.runtime for item in found.transforms)
    with_bias = OutlierSuppression(scale=False, runtime=False)
    program = calibrated(gated(rms=False), inputs, "int8-token", with_bias)
    found = with_bias.run(program).program
    assert sum(item.refused is None for item in found.transforms) >= 2  # both norms


def test_an_operator_at_run_time_must_pay():
    """Channels that lie far from 0 where only an operator can shift them."""
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return self.a(x)

    torch.manual_seed(0)
    for far, count in ((30.0, 1), (0.0, 0)):
        x = torch.randn(64, 16)
        x[:, 5] += far
        method = OutlierSuppression(scale=False)
        found = method.run(calibrated(Far().eval(), [x], "int8-token", method)).program
        assert sum(item.refused is None for item in found.transforms) == count
        assert all(item.runtime for item in found.transforms if item.refused is None)


def test_errors_fall():
    model, inputs = gated(rms=False), tokens()
    plain = error(model, inputs, "int8-token")
    shifted = error(model, inputs, "int8-token", "os-plus{scale=false}")
    both = error(model, inputs, "int8-token", "os-plus")
    assert both < shifted < plain
    assert both < plain / 4


def test_refusals():
    with pytest.raises(ConfigError, match="at least 2"):
        OutlierSuppression(steps=1)
