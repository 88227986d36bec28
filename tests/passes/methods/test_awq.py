"""AWQ: its powers by the paper's formula, its search, its clipping, and what they are for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize, parse
from scaleprop.passes.methods.awq import Awq, importance_scale
from scaleprop.passes.methods.clip_weights import ClipWeights, clip
from scaleprop.recipes import Recipe, Role

from .small import calibrated, change_in_float64, error, gated, images, pictures, tokens

FOUR = Recipe(name="four", description="", roles={"fprop.w": Role(format="int4[1x16]*f32")})
BOTH = Recipe(name="both", description="", roles={
    "fprop.w": Role(format="int4[row]*f32"), "fprop.x": Role(format="int8[row]*f32")})  # fmt: skip


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a = nn.RMSNorm(16), nn.Linear(16, 12)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(0, 1.5, 16))

    def forward(self, x):
        return self.a(self.norm(x))


@pytest.mark.parametrize("recipe", [FOUR, BOTH], ids=["weights", "both"])
def test_the_power_is_the_best_of_the_grid(recipe):
    model, x = Plain().eval(), torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    method = Awq(steps=5)
    found = method.run(calibrated(model, [x], recipe, method)).program
    values = dict(found.module.named_buffers()) | dict(found.module.named_parameters())
    with torch.no_grad():
        y, w = model.norm(x), model.a.weight
        importance = [sum(abs(v) for v in y[:, j].tolist()) / 40 for j in range(16)]
        reach = [max(abs(v) for v in w[:, j].tolist()) for j in range(16)]
        best = None
        for step, reached in [(0, False), *itertools.product(range(1, 6), (False, True))]:
            a = step / 5
            s = torch.tensor([m**a / (r ** (1 - a) if reached else 1)
                              for m, r in zip(importance, reach, strict=True)])
            s = s / (s.max() * s.min()).sqrt()
            left = y / s
            if "fprop.x" in recipe.roles:
                left = fake_quantize(left, recipe.roles["fprop.x"].format)
            got = left @ fake_quantize(w * s, recipe.roles["fprop.w"].format).mT
            noise = float((got - y @ w.mT).square().sum())
            if best is None or noise < best[0]:
                best = noise, s, step
    assert best is not None and 0 < best[2] <= 5
    torch.testing.assert_close(values["a.weight"], w.detach() * best[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["norm.weight"], model.norm.weight.detach() / best[1],
                               rtol=1e-4, atol=1e-6)  # fmt: skip


def test_scales_have_no_size_of_their_own():
    found = importance_scale(torch.tensor([0.0, 1.0, 4.0]).double(), 0.5)
    assert float(found.max() * found.min()) == pytest.approx(1)
    assert float(found[2] / found[1]) == pytest.approx(2)


@pytest.mark.parametrize(("model", "inputs", "recipe"), [
    (gated(rms=True), tokens(), FOUR), (gated(rms=False), tokens(), "int8-token"),
    (images(), pictures(), "int8-weight"),
], ids=["rms", "layer", "images"])  # fmt: skip
@pytest.mark.parametrize("runtime", [True, False])
def test_the_function_stays(model, inputs, recipe, runtime):
    method = Awq(steps=4, runtime=runtime)
    program = calibrated(model, inputs, recipe, method)
    assert method.run(program).modified
    assert change_in_float64(program, method) < 1e-10


def test_errors_fall():
    model, inputs = gated(rms=True), tokens()
    for recipe in (FOUR, BOTH):
        assert error(model, inputs, recipe, "awq") < 0.6 * error(model, inputs, recipe)


def test_clipping_one_block_after_the_other():
    """Each block's best ratio by itself, with the products written out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    weight[::2, 3] *= 15
    rows = torch.randn(30, 24, generator=generator)
    rows[:, 3] *= 0.02
    fmt, ratios = parse("int4[1x8]*f32"), [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    got = clip(weight, rows, fmt, 8, ratios)
    assert got is not None
    for n in range(5):
        for g in range(3):
            at = slice(8 * g, 8 * g + 8)
            block, x = weight[n, at], rows[:, at].double()
            candidates = [block.clamp(-r * block.abs().max(), r * block.abs().max())
                          for r in (1.0, *ratios)]  # fmt: skip
            noise = [float((x @ (fake_quantize(c[None], fmt)[0] - block).double()).square().sum())
                     for c in candidates]  # fmt: skip
            torch.testing.assert_close(got[n, at], candidates[noise.index(min(noise))])
    assert bool((got != weight).any())


def test_rows_that_no_block_divides_are_clipped():
    generator = torch.Generator().manual_seed(1)
    weight, rows = torch.randn(4, 20, generator=generator), torch.randn(9, 20, generator=generator)
    got = clip(weight, rows, parse("int4[1x16]*f32"), 16, [0.9, 0.8, 0.7])
    assert got is not None and got.shape == (4, 20)


def test_clipping_in_a_model_lowers_the_error():
    model, inputs = gated(rms=True), tokens()
    with torch.no_grad():
        model.gate.weight[::3, 5] = 2.0  # a large weight in every third row
        model.calm.weight[5] = 0.05  # that meets nothing large
    plain = error(model, inputs, FOUR)
    assert error(model, inputs, FOUR, "clip-weights") < 0.95 * plain
    before = model.gate.weight.clone()
    method = ClipWeights()
    found = method.run(calibrated(model, inputs, FOUR, method))
    assert found.modified and not method.preserves_function
    torch.testing.assert_close(model.gate.weight, before)
    new = dict(found.program.module.named_buffers())["gate.weight"]
    assert new.abs().max() < before.abs().max()


def test_clipping_leaves_shared_weights_and_whole_tensors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    x = torch.randn(20, 8)
    method = ClipWeights()
    for model, recipe, why in (
        (Tied(), FOUR, "other operators read"),
        (nn.Sequential(nn.Linear(8, 4)), Recipe(name="t", description="", roles={
            "fprop.w": Role(format="int4[tensor]*f32")}), "serve several rows"),
    ):  # fmt: skip
        found = method.run(calibrated(model.eval(), [x], recipe, method))
        assert not found.modified and any(why in note for note in found.notes)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: Awq(steps=0), "at least 1"), (lambda: ClipWeights(shrink=1.0), "between 0 and 1"),
    (lambda: ClipWeights(steps=0), "at least 1"),
])  # fmt: skip
def test_refusals(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
