"""Error compensation: closer outputs for every format, nearest where inputs are uncorrelated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import scaleprop
from scaleprop.calibration.moments import SecondMoment
from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, ConfigError, PassError
from scaleprop.formats import quantize
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.compensation import compensated
from scaleprop.passes.pipeline import build, parse_pass
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes import Recipe, Role, named_recipe

FORMATS = (
    "int4[row]*f32",
    "int4[1x32]*f32+zp",
    "int8[row]*f32+zp",
    "int8[row]*f32",
    "int4[1x32]*f32",
    "int4[1x128]*f16",
    "int8[1x32]*f32",
    "int4[1x200]*f32",  # longer than a span of columns
    "int8",
    "fp8",
    "e4m3[row]*f32",
    "mxfp8",
    "mxfp8:rceil",
    "mxfp6",
    "mxfp4",
    "mxfp4:mse",
    "nvfp4",
    "nvfp4:fouroversix",
    "nf4",
)


def correlated(size: int, seed: int = 0) -> Tensor:
    """A second moment with a few strong directions, as activations have: a sum over 1000 rows."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1000, 8, generator=generator) @ torch.randn(8, size, generator=generator)
    x = mixed + 0.5 * torch.randn(1000, size, generator=generator)
    return (x.t() @ x).double()


def weight(rows: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(matrix: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ)."""
    d = matrix.double() - approximation.double()
    return float(((d @ moment) * d).sum())


@pytest.mark.parametrize("clipping", ["amax", "mse"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [256, 150])
def test_outputs_are_closer_than_with_rounding_to_nearest(fmt: str, clipping: str, size: int):
    matrix, moment = weight(24, size), correlated(size)
    got = compensated(matrix, fmt, moment, clipping=clipping)  # type: ignore[arg-type]
    searched = scaleprop.formats.parse(fmt).replace(rule="mse") if clipping == "mse" else fmt
    plain = quantize(matrix, searched).dequantize()
    ratio = output_error(matrix, got.dequantize(), moment) / output_error(matrix, plain, moment)
    assert ratio < 0.9
    assert str(got.format) == str(scaleprop.formats.parse(fmt))
    assert got.shape == matrix.shape and got.dtype == matrix.dtype


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [256, 150])
def test_uncorrelated_inputs_leave_round_to_nearest(fmt: str, size: int):
    matrix = weight(24, size)
    spread = torch.rand(size, generator=torch.Generator().manual_seed(2)).double() + 0.1
    for moment in (torch.eye(size), torch.diag(spread), torch.zeros(size, size)):
        got, want = compensated(matrix, fmt, moment), quantize(matrix, fmt)
        assert torch.equal(got.dequantize(), want.dequantize())
        assert all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
                   for a, b in zip(got.parts, want.parts, strict=True))  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_stand_for_the_values(fmt: str):
    got = compensated(weight(24, 256), fmt, correlated(256))
    values = got.dequantize()
    assert values.isfinite().all()
    given = [part for part in (got.scale, got.tensor_scale, got.zero_point) if part is not None]
    again = quantize(values, fmt, scales=given)
    assert torch.equal(again.dequantize(), values)
    assert torch.equal(again.codes(), got.codes())


def test_against_the_definition_one_column_at_a_time():
    """The conditional minimiser, recomputed from H for every column (Optimal Brain Surgeon)."""
    size, matrix, moment = 40, weight(5, 40), correlated(40)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(size)
    scale = quantize(matrix, "int4[row]*f32").scale
    left, rounded = matrix.double(), torch.zeros(5, size)
    for j in range(size):
        column = left[:, j : j + 1].float()
        rounded[:, j : j + 1] = torch.clamp(torch.round(column / scale), -7, 7) * scale
        error = left[:, j] - rounded[:, j].double()
        if j + 1 < size:  # minimise over the free columns: H_ff d = -H_fj · (-error)
            free = damped[j + 1 :, j + 1 :]
            left[:, j + 1 :] += error[:, None] * torch.linalg.solve(free, damped[j + 1 :, j])
    got = compensated(matrix, "int4[row]*f32", moment)
    assert torch.equal(got.dequantize(), rounded)


def test_rows_are_independent_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    matrix, moment = weight(24, 96), correlated(96)
    for fmt in ("mxfp4", "nvfp4", "int4[row]*f32", "int4+zp", "fp8"):
        whole = compensated(matrix, fmt, moment)
        monkeypatch.setattr("scaleprop.passes.compensation._ROWS", 7)
        assert torch.equal(compensated(matrix, fmt, moment).dequantize(), whole.dequantize())
        monkeypatch.undo()


def test_only_the_direction_of_the_moment_counts():
    matrix, moment = weight(8, 64), correlated(64)
    want = compensated(matrix, "mxfp4", moment).dequantize()
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(compensated(matrix, "mxfp4", moment * factor).dequantize(), want)


def test_dead_inputs_round_to_nearest():
    matrix, moment = weight(8, 64), correlated(64)
    moment[5], moment[:, 5] = 0, 0
    got = compensated(matrix, "int8[row]*f32", moment, damping=0.001)
    want = quantize(matrix, "int8[row]*f32")
    assert torch.equal(got.codes()[:, 5], want.codes()[:, 5])
    assert not torch.equal(got.codes(), want.codes())
    assert compensated(matrix[:0], "mxfp4", moment).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    matrix, moment = weight(8, 64).to(dtype), correlated(64)
    got = compensated(matrix, "mxfp8", moment)
    assert got.dtype == dtype
    nearest = quantize(matrix, "mxfp8").dequantize(torch.float64)
    error = output_error(matrix, got.dequantize(torch.float64), moment)
    assert error < output_error(matrix, nearest, moment)


@pytest.mark.parametrize(
    ("fmt", "remedy"),
    [("nvfp4_2d", "1-D blocks"), ("int8[channel]*f32", "1-D blocks")],
)
def test_formats_that_cannot_be_compensated(fmt: str, remedy: str):
    with pytest.raises(PassError, match=remedy):
        compensated(weight(4, 64), fmt, correlated(64))


def test_bad_weights_and_moments():
    matrix, moment = weight(4, 64), correlated(64)
    broken = moment.clone()
    broken[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        compensated(matrix, "mxfp8", broken)
    with pytest.raises(CalibrationError, match="larger damping"):
        compensated(matrix, "mxfp8", -moment)
    with pytest.raises(CalibrationError, match="larger damping"):
        compensated(matrix, "mxfp8", torch.ones(64, 64), damping=0.0)
    with pytest.raises(CalibrationError, match="64 inputs"):
        compensated(matrix, "mxfp8", moment[:5, :5])
    matrix[0, 0] = torch.inf
    with pytest.raises(PassError, match="rounding='nearest'"):
        compensated(matrix, "mxfp8", moment)


def test_second_moments_stream():
    x = torch.randn(1300, 24, generator=torch.Generator().manual_seed(0))
    whole = SecondMoment(24)
    for piece in (x[:3].reshape(1, 3, 24), x[3:3], x[3:1000], x[1000:]):
        whole.add(piece)
    want = x.double().t() @ x.double()
    torch.testing.assert_close(whole.total(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.total(), want, rtol=1e-5, atol=1e-4)  # asking changes nothing
    halves = [dataclasses.replace(TensorStatistics.of(h), second_moment=h.t().double() @ h.double())
              for h in (x[:600], x[600:])]  # fmt: skip
    merged = halves[0].merge(halves[1]).second_moment
    assert merged is not None
    torch.testing.assert_close(merged, want)
    assert halves[0].merge(TensorStatistics.of(x)).second_moment is None


# ------------------------------------------------------------------ recipes, passes, end to end


class Two(nn.Module):
    """A table, two linears in a row, and one weight used on two values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.mix = nn.Linear(64, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embed(ids))
        return self.down(torch.relu(self.up(x))) + self.mix(torch.tanh(x))


@pytest.fixture
def two() -> Two:
    torch.manual_seed(0)
    model = Two().eval()
    with torch.no_grad():  # correlated inputs everywhere, as in trained models
        model.embed.weight.copy_(torch.randn(50, 6) @ torch.randn(6, 64))
    return model


def batches(seed: int, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (3, 5 + n), generator=generator) for n in range(count)]


def mean_error(compiled: scaleprop.CompiledModel, model: nn.Module) -> float:
    errors = [(compiled(ids) - model(ids)).square().mean() for ids in batches(9)]
    return float(torch.stack(errors).mean())


def compile_(model: nn.Module, recipe: str | Recipe, *passes: str, calibrated: bool = True):
    return scaleprop.compile(model, batches(0)[0], recipe=recipe, backend="reference",
                             passes=passes, calibration=batches(1) if calibrated else None)


@torch.no_grad()
def test_the_named_recipe_end_to_end(two: Two):
    compiled = compile_(two, "mxfp8-weight-compensated")
    nearest = compile_(two, "mxfp8-weight-compensated", "quantize-weights{rounding=nearest}",
                       calibrated=False)
    assert mean_error(compiled, two) < 0.95 * mean_error(nearest, two)
    assert compiled.nbytes == nearest.nbytes
    formats = {r.operand: r.format for r in compiled.report.quantized}
    assert formats["mix.weight"] == formats["down.weight"] == "mxfp8:rceil"
    assert any("3 weights rounded with compensation" in note for note in compiled.report.notes)
    assert not any(s.second_moment is not None for s in compiled.program.statistics.values())


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4-weight", "nvfp4-weight", "fp8-weight"])
def test_the_pass_option_works_for_any_recipe(two: Two, recipe: str):
    compiled = compile_(two, recipe, "quantize-weights{rounding=compensated, damping=0.02}")
    assert mean_error(compiled, two) < 0.9 * mean_error(compile_(two, recipe), two)


@torch.no_grad()
def test_a_weight_used_twice_is_rounded_once_for_both_inputs(two: Two):
    compiled = compile_(two, "int4-g32", "quantize-weights{rounding=compensated}")
    stored = [name for name in dict(compiled.program.module.named_buffers()) if "mix" in name]
    assert sorted(stored) == ["mix.weight_data", "mix.weight_scale", "mix.weight_zero_point"]


def test_calibration_is_asked_for_by_name(two: Two):
    with pytest.raises(CalibrationError, match=r"'mxfp8-weight-compensated'.*calibration="):
        compile_(two, "mxfp8-weight-compensated", calibrated=False)
    with pytest.raises(CalibrationError, match=r"'int4'.*calibration="):
        compile_(two, "int4", "quantize-weights{rounding=compensated}", calibrated=False)
    compile_(two, "int4", calibrated=False)


def test_what_calibration_did_not_see_is_named(two: Two):
    manager = build(named_recipe("mxfp8-weight-compensated"), calibration=batches(1))
    program = scaleprop.compile(two, batches(0)[0], recipe=Recipe(
        name="none", description="", roles={}), backend="reference").program  # fmt: skip
    steps = [step for step in manager.passes if not isinstance(step, Calibrate)]
    with pytest.raises(CalibrationError, match=r"mix|linear.*no second moment"):
        dataclasses.replace(manager, passes=steps).run(program)


def test_unsupported_formats_name_the_operator(two: Two):
    recipe = Recipe(name="tiles", description="", roles={
        "fprop.w": Role(format="nvfp4_2d", rounding="compensated")})  # fmt: skip
    with pytest.raises(PassError, match=r"node 'linear.*1-D blocks"):
        compile_(two, recipe)


def test_moments_are_collected_only_where_wanted(two: Two):
    manager = build(named_recipe("int8"), calibration=batches(1))
    seen = []

    class Spy(Calibrate):
        def run(self, program):  # type: ignore[no-untyped-def]
            result = super().run(program)
            seen.append(result.program.statistics)
            return result

    def with_spy(manager, **options):  # type: ignore[no-untyped-def]
        return dataclasses.replace(manager, passes=[
            Spy(data=batches(1), **options) if isinstance(step, Calibrate) else step
            for step in manager.passes])  # fmt: skip

    from scaleprop.passes.capture import capture

    program = capture(two, (batches(0)[0],), {}, None)
    with_spy(manager).run(program)
    assert seen[0] and all(s.second_moment is None for s in seen[0].values())
    with_spy(build(named_recipe("mxfp8-weight-compensated"), calibration=batches(1))).run(program)
    moments = [s.second_moment for s in seen[1].values()]
    assert sorted(m.shape[0] for m in moments if m is not None) == [64, 64, 64, 96]
    notes = build(named_recipe("int4"), calibration=batches(1)).run(program).notes
    assert any("nothing to calibrate" in note for note in notes)


@pytest.mark.parametrize("key", ["fprop.x", "conv.w", "conv.x", "embedding"])
def test_only_linear_weights_are_compensated(key: str):
    role = Role(format="int8[tensor]*f32", rounding="compensated")
    with pytest.raises(ConfigError, match=r"fprop\.w"):
        Recipe(name="r", description="", roles={key: role})


def test_options_are_checked():
    parsed = parse_pass("quantize-weights{rounding=compensated, damping=0.1}")
    assert parsed == QuantizeWeights(rounding="compensated", damping=0.1)
    for text in ("{rounding=upwards}", "{damping=-1}", "{damping=much}"):
        with pytest.raises(ConfigError, match=r"rounding|damping"):
            parse_pass(f"quantize-weights{text}")
    recipe = named_recipe("mxfp8-weight-compensated")
    assert recipe.needs_calibration and recipe.compensates
    assert Recipe.from_dict(recipe.to_dict()) == recipe
