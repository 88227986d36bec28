"""MergeQuant: steps against the paper's formula in loops, what it gains, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.passes.assign import assignment_of
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.methods.merge_quant import MergeQuant
from scaleprop.passes.methods.smooth import Smooth
from scaleprop.passes.quantize_activations import QuantizeActivations
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes.base import Recipe, Role
from tests.passes.methods.small import parameter, prepared

SIZE, HOT = 32, [3, 11, 26]
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)


class Layer(nn.Module):
    """A norm and one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE)
        self.out = nn.Linear(SIZE, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Block(nn.Module):
    """Grouped attention, then gate·up→down, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(SIZE), nn.RMSNorm(SIZE)
        self.q, self.k, self.v = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 16), nn.Linear(SIZE, 16)
        self.o = nn.Linear(SIZE, SIZE, bias=False)
        self.gate, self.up = nn.Linear(SIZE, 48), nn.Linear(SIZE, 48)
        self.down = nn.Linear(48, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (f(h).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def model_of(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 16, SIZE)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))):
            norm.weight.copy_(torch.rand(SIZE) + 0.5)
            norm.weight[HOT] *= torch.tensor([18.0, 9.0, 6.0])
    return model, x


def best_step(column: Tensor) -> float:
    """One channel's step: the share of its range with the least squared error, in loops."""
    amax = float(column.abs().max())
    best = (float("inf"), 1.0)
    for clip in CLIPS:
        step = clip * amax / 7
        # the extremes count once more: a sample may lack them
        values = [*column.tolist(), float(column.min()), float(column.max())]
        error = sum((v - step * max(-7, min(7, round(v / step)))) ** 2 for v in values)
        best = min(best, (error, clip), key=lambda item: item[0])
    return best[1] * amax / 7


def test_a_norm_divides_by_the_steps_and_its_reader_multiplies_with_them():
    model, x = model_of(Layer)
    found = MergeQuant(clips=CLIPS, balance=(1.0,)).run(
        prepared(model, x, "int4-int4-static")).program
    y = model.norm(x).detach().reshape(-1, SIZE)
    gain, weight = parameter(found, "norm.weight"), parameter(found, "out.weight")
    ratio = model.norm.weight.detach() / gain
    steps = torch.tensor([best_step(y[:, j]) for j in range(SIZE)])
    assert len({round(float(c), 3) for c in steps * 7 / y.abs().amax(0)}) > 1, "clips differ"
    torch.testing.assert_close(ratio / ratio[0], steps / steps[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(weight, model.out.weight.detach() * ratio, rtol=1e-5, atol=1e-7)
    [reader] = [node for node in found.module.graph.nodes if assignment_of(node) is not None]
    assert assignment_of(reader).extremes is not None


def test_the_chosen_range_becomes_the_scale_and_falls_away_with_the_value():
    model, x = model_of(Layer)
    found = MergeQuant().run(prepared(model, x, "int4-int4-static")).program
    [reader] = [node for node in found.module.graph.nodes if assignment_of(node) is not None]
    low, high = assignment_of(reader).extremes
    for step in (QuantizeWeights(), QuantizeActivations()):
        found = step.run(found).program  # no calibration after it: the range is enough
    scale = parameter(found, "_scale")
    assert float(scale) == pytest.approx(max(-low, high) / 7)
    again = MergeQuant().run(prepared(model, x, "int4-int4-static")).program
    again = Calibrate(data=[x], everything=True, channels=True).run(again).program
    again = Smooth(alpha=0.9).run(again).program
    readers = [assignment_of(node) for node in again.module.graph.nodes]
    assert [item.extremes for item in readers if item is not None] == [None]


@pytest.mark.parametrize(("kind", "element"), [
    (Layer, "int8"), (Layer, "int4[tensor]*f32"), (Block, "int4[tensor]*f32+zp"),
])  # fmt: skip
def test_the_function_is_kept(kind, element):
    model, x = model_of(kind)
    recipe = Recipe(name="r", description="", roles={
        "fprop.w": Role(format="int8[row]*f32"), "fprop.x": Role(format=element, scaling="static")})
    compiled = scaleprop.compile(model, x, recipe, "reference", calibration=[x],
                                 passes=["merge-quant"], verify=True)
    records = [item for item in compiled.program.transforms if item.refused is None]
    assert records and all(not item.runtime for item in records)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_static_w4a4_comes_close_to_scales_found_at_run_time():
    model, x = model_of(Block)
    want = model(x)
    error = {}
    for recipe, passes in (("int4-int4", ()), ("int4-int4-static", ()),
                           ("int4-int4-static", ("merge-quant",))):
        got = scaleprop.compile(model, x, recipe, "reference", calibration=[x], passes=passes)
        error[recipe, passes] = relative(got(x), want)
    dynamic, static, merged = error.values()
    assert static > 1.3 * dynamic, "the data is hard for one scale"
    assert merged < dynamic


def test_it_runs_in_integers_on_onnxruntime():
    model, x = model_of(Block)
    compiled = scaleprop.compile(model, x, "int4-int4-static", calibration=[x],
                                 passes=["merge-quant"], verify=True)
    lowered = {record.lowering for record in compiled.report.records
               if record.role == "fprop.w" and record.format}
    assert lowered == {"MatMulIntegerToFloat u8×s8"}


def test_it_keeps_everything_where_nothing_would_be_gained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()  # what it reads is an input
    x = torch.randn(40, 8)
    program = prepared(model, x, "int4-int4-static")
    result = MergeQuant(runtime=False).run(program)
    assert [record.refused is not None for record in result.program.transforms] == [True]
    [reader] = [node for node in result.program.module.graph.nodes if assignment_of(node)]
    low, high = assignment_of(reader).extremes
    # the range is searched all the same, for the whole tensor
    weight = model[0].weight.double().square().sum(0)
    rows = torch.cat([x, x.min(0).values[None], x.max(0).values[None]]).double()
    errors = {}
    for clip in MergeQuant().clips:
        scale = torch.tensor(clip * float(x.abs().max()) / 7)
        rounded = fake_quantize(rows, "int4[tensor]*f32", scales=[scale])
        errors[clip] = float(((rounded - rows).square() * weight).sum())
    best = min(errors, key=lambda clip: errors[clip])
    assert max(-low, high) == pytest.approx(best * float(x.abs().max()))


def test_dynamic_activations_are_left_alone():
    model, x = model_of(Layer)
    result = MergeQuant().run(prepared(model, x, "int4-int4"))
    assert not result.modified and "no activation is static" in " ".join(result.notes)


@pytest.mark.parametrize(("options", "text"), [
    ({"clips": (0.5, 1.2)}, "shares of a range"), ({"clips": ()}, "shares of a range"),
    ({"balance": (-0.1,)}, "exponents in"),
])  # fmt: skip
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        MergeQuant(**options)
