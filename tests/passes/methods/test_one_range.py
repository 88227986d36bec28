"""RepQ, DopQ, OutlierTune, SmoothQuant with a bias, scale folding: values by the papers' formulas,
the function kept, and what each is for."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn

from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.passes.methods.dopq import DopQ
from scaleprop.passes.methods.outlier_tune import OutlierTune
from scaleprop.passes.methods.repq import RepQ, aligned, ratios
from scaleprop.passes.methods.scale_folding import ScaleFolding
from scaleprop.passes.methods.smooth_bias import SmoothBias
from scaleprop.recipes import Recipe, Role

from .small import calibrated, change_in_float64, error, gated, images, pictures, tokens

TENSOR = Recipe(name="tensor", description="", roles={
    "fprop.w": Role(format="int8[row]*f32"), "fprop.x": Role(format="int8[tensor]*f32+zp")})
SIGNED = Recipe(name="signed", description="", roles={
    "fprop.w": Role(format="int8[row]*f32"), "fprop.x": Role(format="int8[tensor]*f32")})
FOUR = Recipe(name="four", description="", roles={"fprop.w": Role(format="int4[1x16]*f32")})


class Plain(nn.Module):
    """A norm, and a linear that reads it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8) if bias else nn.RMSNorm(8)
        self.a = nn.Linear(8, 6)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, 1, 20, 1, 0.5, 1, 3, 2]))
            if bias:
                self.norm.bias.copy_(torch.tensor([0.0, 9, -4, 0, 0, 1, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x))


ROWS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def changed(method, recipe, bias=True):
    """Norm's weight and bias, the linear's weight and bias; and extremes of each channel before."""
    model = Plain(bias).eval()
    found = method.run(calibrated(model, [ROWS], recipe, method)).program
    values = dict(found.module.named_buffers()) | dict(found.module.named_parameters())
    with torch.no_grad():
        y = model.norm(ROWS)
    return model, values, y.min(0).values.tolist(), y.max(0).values.tolist()


@pytest.mark.parametrize(("method", "common"), [
    (RepQ(), statistics.fmean), (DopQ(), statistics.median),
    (RepQ(common="median"), statistics.median),
], ids=["repq", "dopq", "option"])  # fmt: skip
def test_one_scale_and_zero_point_replace_those_of_channels(method, common):
    """As RepQ-ViT writes it, with scales s and zero points z of 8 bits, not rounded."""
    model, values, low, high = changed(method, TENSOR)
    s = [(b - a) / 255 for a, b in zip(low, high, strict=True)]
    z = [-a / c for a, c in zip(low, s, strict=True)]
    s_common, z_common = common(s), statistics.fmean(z)
    r1 = torch.tensor(s) / s_common  # variation factors, eq. 8
    r2 = torch.tensor(z) - z_common
    moved = torch.tensor(s) * r2  # eq. 9: (x + s·r2)/r1
    torch.testing.assert_close(values["norm.weight"], model.norm.weight.detach() / r1,
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(values["norm.bias"], (model.norm.bias.detach() + moved) / r1,
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(values["a.weight"], model.a.weight.detach() * r1,
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    want = model.a.bias.detach() - model.a.weight.detach() @ moved
    torch.testing.assert_close(values["a.bias"], want, rtol=1e-5, atol=1e-5)


def test_channels_then_round_as_with_scales_of_their_own():
    """The tensor's scale gives what one scale for each channel gave, up to zero points."""
    model, values, *_ = changed(OutlierTune(), SIGNED)
    with torch.no_grad():
        y = model.norm(ROWS)
        own = torch.stack([fake_quantize(column - (column.max() + column.min()) / 2,
                                         "int8[tensor]*f32") for column in y.T], 1)
        norm = nn.functional.layer_norm(ROWS, (8,), values["norm.weight"], values["norm.bias"])
        one = fake_quantize(norm, "int8[tensor]*f32") * ((y.max(0).values - y.min(0).values) / 2)
    torch.testing.assert_close(one, own, rtol=1e-4, atol=1e-4)


def test_without_a_zero_point_ranges_are_symmetric():
    model, values, low, high = changed(RepQ(), SIGNED)
    half = torch.tensor([(b - a) / 2 for a, b in zip(low, high, strict=True)])
    centre = torch.tensor([(b + a) / 2 for a, b in zip(low, high, strict=True)])
    r = half / half.mean()
    torch.testing.assert_close(values["norm.bias"], (model.norm.bias.detach() - centre) / r,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("recipe", [TENSOR, SIGNED], ids=["affine", "signed"])
def test_norms_without_a_bias_are_scaled_only(recipe):
    model, values, low, high = changed(RepQ(), recipe, bias=False)
    if recipe is SIGNED:
        width = torch.tensor([2 * max(-a, b) for a, b in zip(low, high, strict=True)])
    else:
        width = torch.tensor([max(b, 0) - min(a, 0) for a, b in zip(low, high, strict=True)])
    torch.testing.assert_close(values["norm.weight"],
                               model.norm.weight.detach() / (width / width.mean()),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(values["a.bias"], model.a.bias.detach())


def test_smoothing_takes_what_is_left_after_the_shift():
    model, values, low, high = changed(SmoothBias(alpha=0.7), TENSOR)
    weight = model.a.weight.detach()
    s = torch.tensor([((b - a) / 2) ** 0.7 / float(weight[:, j].abs().max()) ** 0.3
                      for j, (a, b) in enumerate(zip(low, high, strict=True))])  # fmt: skip
    centre = torch.tensor([(b + a) / 2 for a, b in zip(low, high, strict=True)])
    torch.testing.assert_close(values["a.weight"], weight * s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["norm.bias"], (model.norm.bias.detach() - centre) / s,
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_folded_scales_are_powers_of_magnitudes():
    model, values, low, high = changed(ScaleFolding(steps=4), FOUR, bias=False)
    reach = torch.tensor([max(-a, b) for a, b in zip(low, high, strict=True)])
    level = reach / reach.log().mean().exp()
    with torch.no_grad():
        y, w = model.norm(ROWS), model.a.weight
        noise = {step: float((y @ w.mT - y / level ** (step / 4) @ fake_quantize(
            w * level ** (step / 4), "int4[1x16]*f32").mT).square().sum()) for step in range(5)}
    best = min(noise, key=lambda step: noise[step])
    assert best > 0
    torch.testing.assert_close(values["a.weight"], w.detach() * level ** (best / 4),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


METHODS = [RepQ(), DopQ(), OutlierTune(), SmoothBias(), ScaleFolding(steps=3),
           RepQ(runtime=True), OutlierTune(runtime=True, symmetric=False)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.runtime}")
def test_the_function_stays(method):
    for model, inputs, recipe in (
        (gated(rms=True), tokens(1), TENSOR), (gated(rms=False), tokens(1), SIGNED),
        (images(), pictures(1), "int8"),
    ):  # fmt: skip
        program = calibrated(model, inputs, recipe, method)
        assert change_in_float64(program, method) < 1e-10
        if not isinstance(model, type(images())):
            assert method.run(program).modified


@pytest.mark.parametrize(("method", "recipe"), [
    ("repq", TENSOR), ("dopq", TENSOR), ("outlier-tune", TENSOR), ("sq-b", TENSOR),
    ("scale-folding", TENSOR), ("scale-folding", FOUR), ("repq", SIGNED),
])  # fmt: skip
def test_errors_fall(method, recipe):
    model, inputs = MODEL, tokens(2)
    assert error(model, inputs, recipe, method) < 0.7 * error(model, inputs, recipe)


MODEL = gated(rms=False)


def test_only_what_is_quantized_and_behind_a_norm():
    method = RepQ()
    found = method.run(calibrated(MODEL, tokens(1), FOUR, method))
    assert not found.modified  # activations stay as they are
    found = method.run(calibrated(MODEL, tokens(1), TENSOR, method)).program
    assert {record.seed for record in found.transforms} <= {"layer_norm", "layer_norm_1"}


def test_constant_channels_and_channels_that_are_0():
    low, high = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([3.0, 0.0, 3.0])
    torch.testing.assert_close(aligned(low, high), torch.tensor([3.0, 0.0, 0.0]))
    torch.testing.assert_close(aligned(low[:2], high[:2]), low[:2])
    found = ratios(torch.tensor([0.0, 2.0, 4.0]), "mean").tolist()
    assert found == pytest.approx([1, 2 / 3, 4 / 3])
    assert ratios(torch.zeros(2), "median").tolist() == [1, 1]


@pytest.mark.parametrize(("make", "match"), [
    (lambda: SmoothBias(alpha=1.1), "must be in"), (lambda: ScaleFolding(steps=0), "at least 1"),
])  # fmt: skip
def test_refusals(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
