"""Errors of candidates: against one reader at a time, number by number, and what cannot be told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scaleprop.errors import CalibrationError, PassError
from scaleprop.formats import fake_quantize
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.methods.smooth import Smooth
from scaleprop.passes.transforms.base import Work
from scaleprop.passes.transforms.search import OutputError, RegionError, output_error
from scaleprop.recipes import Recipe, Role, named_recipe

ROWS = "int8[row]*f32"


class Two(nn.Module):
    """Two linears that read the same normalised value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.a(x), self.b(x)


def work(model, inputs, recipe, sample=64, channels=True):
    program = capture(model, (inputs[0],), {})
    recipe = named_recipe(recipe) if isinstance(recipe, str) else recipe
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=recipe),
                 Calibrate(data=inputs, everything=True, channels=channels, sample=sample)):
        program = step.run(program).program
    return Work(program, Smooth())


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    model = Two().eval()
    return model, [torch.randn(n, 16) * torch.logspace(-1, 1, 16) for n in (5, 20)]


def slow(rows, weights, activation, weight, transform=None):
    """One output after the other, in float64."""
    transform = torch.eye(rows.shape[1]).double() if transform is None else transform
    y = rows.double() @ transform
    noise = signal = 0.0
    for w in weights:
        v = w.double() @ torch.linalg.inv(transform).mT
        x = y if activation is None else fake_quantize(y, activation)
        got = x @ (v if weight is None else fake_quantize(v, weight)).mT
        for i in range(len(rows)):
            for o in range(len(w)):
                exact = float(rows[i].double() @ w[o].double())
                noise += (float(got[i, o]) - exact) ** 2
                signal += exact**2
    return noise / signal


@pytest.mark.parametrize(("recipe", "formats"), [
    ("int8-token", (ROWS, ROWS)), ("int8-weight", (None, ROWS)),
    ("mxfp4", ("mxfp4:even", "mxfp4:even")),
])  # fmt: skip
@pytest.mark.parametrize("how", ["none", "scale", "rotation", "both"])
def test_it_is_the_error_of_both_readers(two, recipe, formats, how):
    model, inputs = two
    found = work(model, inputs, recipe)
    (site,) = found.sites()
    rows = found.statistics(site).sample
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)).double() + 0.5
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()).Q
    transform = torch.eye(16).double()
    if how in ("scale", "both"):
        transform = transform * scale
    if how in ("rotation", "both"):
        transform = transform @ torch.block_diag(q, q, q, q)
    got = output_error(found, site, scale=scale if how in ("scale", "both") else None,
                       rotation=q if how in ("rotation", "both") else None)
    want = slow(rows, [model.a.weight.detach(), model.b.weight.detach()], *formats, transform)
    # float32 here, float64 there: a value between two codes may round either way
    assert got == pytest.approx(want, rel=0.02)
    assert got > 0


def test_what_is_not_quantized_has_no_error(two):
    model, inputs = two
    found = work(model, inputs, Recipe(name="x", description="", roles={
        "fprop.x": Role(format="e4m3[row]*f32")}))  # fmt: skip
    (site,) = found.sites()
    rows = found.statistics(site).sample
    want = slow(rows, [model.a.weight.detach(), model.b.weight.detach()], "e4m3[row]*f32", None)
    assert output_error(found, site) == pytest.approx(want, rel=0.02)


def test_a_shift_counts_only_through_what_is_rounded(two):
    model, inputs = two
    found = work(model, inputs, "int8-token")
    (site,) = found.sites()
    rows = found.statistics(site).sample
    shift = torch.randn(16, generator=torch.Generator().manual_seed(3)).double()
    noise = signal = 0.0
    for w in (model.a.weight.detach(), model.b.weight.detach()):
        exact = rows @ w.mT
        got = fake_quantize(rows - shift.float(), ROWS) @ fake_quantize(w, ROWS).mT + (
            w.double() @ shift).float()  # fmt: skip
        noise += float((got - exact).square().sum())
        signal += float(exact.square().sum())
    assert output_error(found, site, shift=shift) == pytest.approx(noise / signal, rel=0.01)


def test_static_scales_span_all_that_was_seen(two):
    """Three rows are kept of 25: the range is that of all."""
    model, inputs = two
    found = work(model, inputs, "int8", sample=3)
    (site,) = found.sites()
    seen = found.statistics(site)
    scale = torch.logspace(0, -1, 16).double()
    got = output_error(found, site, scale=scale)
    low, high = seen.channel_min * scale, seen.channel_max * scale
    step = float(torch.clamp(high.max(), min=0) - torch.clamp(low.min(), max=0)) / 255
    zero = round(-min(float(low.min()), 0.0) / step)
    codes = (seen.sample * scale / step).round() + zero
    x = (codes.clamp(0, 255) - zero) * step
    noise = signal = 0.0
    for w in (model.a.weight.detach(), model.b.weight.detach()):
        exact = seen.sample @ w.mT
        noise += float((x.float() @ fake_quantize(w / scale.float(), ROWS).mT - exact)
                       .square().sum())
        signal += float(exact.square().sum())
    assert got == pytest.approx(noise / signal, rel=0.02)


def test_grouped_convolutions_count_each_tap():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, (1, 3), groups=2)).eval()
    inputs = [torch.randn(1, 6, 2, 5)]
    found = work(model, inputs, "int8-weight", sample=8)
    site = found.sites()[1]
    assert len(site.readers) == 1 and site.size == 4
    rows, weight = found.statistics(site).sample, model[1].weight.detach()
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    new = torch.empty_like(weight)
    for o in range(6):
        for i in range(2):
            new[o, i] = weight[o, i] / scale[2 * (o // 3) + i]
    rounded = fake_quantize(new.reshape(6, -1), ROWS).reshape(new.shape)
    noise = signal = 0.0
    for row in rows:
        for o in range(6):
            for tap in range(3):
                inner = [2 * (o // 3) + i for i in range(2)]
                exact = sum(float(row[c] * weight[o, i, 0, tap]) for i, c in enumerate(inner))
                got = sum(float(row[c] * scale[c] * rounded[o, i, 0, tap])
                          for i, c in enumerate(inner))  # fmt: skip
                noise += (got - exact) ** 2
                signal += exact**2
    assert output_error(found, site, scale=scale) == pytest.approx(noise / signal, rel=0.01)


def test_a_region_is_the_mean_of_its_sites(two):
    model, inputs = two
    found = work(model, inputs, "int8-token")
    sites = found.sites()
    region = found.region(sites[0], "scale")
    assert region is not None
    scale = torch.rand(16).double() + 0.5
    assert RegionError(found, region, sites)(scale=scale) == output_error(
        found, sites[0], scale=scale)


def test_other_formats_can_be_asked_for(two):
    model, inputs = two
    found = work(model, inputs, "int8-weight")
    (site,) = found.sites()
    four = OutputError(found, site, weight=Role(format="int4[row]*f32"))()
    assert four > 50 * OutputError(found, site)()


def test_refusals(two):
    model, inputs = two
    found = work(model, inputs, "int8-token", sample=0)
    (site,) = found.sites()
    with pytest.raises(CalibrationError, match="kept no rows"):
        OutputError(found, site)
    found = work(model, inputs, "int8-token")
    with pytest.raises(PassError, match="does not fit 16 channels"):
        output_error(found, found.sites()[0], rotation=torch.eye(5).double())
