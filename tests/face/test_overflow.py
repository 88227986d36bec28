"""``analyze`` with a loss: NaN and Inf are never hidden, and masks are no overflow."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import CalibrationError
from scaleprop.report import ScaleReport

WIDTH, ROWS = 8, 6
HIDDEN = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)


def mean_square(y: torch.Tensor) -> torch.Tensor:
    return y.float().square().mean()


class Step(nn.Module):
    """One weight, then whatever ``function`` does with x·w."""

    def __init__(self, function, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(weight), function

    def forward(self, x):
        return self.function(x @ self.weight)


def step(function, dtype: torch.dtype = torch.float, scale: float = 1.0) -> ScaleReport:
    torch.manual_seed(0)
    model = Step(function, torch.eye(WIDTH, dtype=dtype) * scale)
    return scaleprop.analyze(model, torch.randn(ROWS, WIDTH).to(dtype), loss_fn=mean_square)


def row(report: ScaleReport, op: str):
    (found,) = [t for t in report.of_phase("forward") if t.op == f"aten.{op}"]
    return found


def overflow(report: ScaleReport):
    return [finding for finding in report.findings if finding.name == "overflow"]


def line_of(function) -> str:
    return f"{re.escape(__file__)}:{inspect.getsourcelines(function)[1] + 1} in"


def logarithm(y):
    return torch.log(y).relu() + 1


def root(y):
    return torch.sqrt(y * 0)


def softmax_of_rows_without_keys(y):
    return y.masked_fill(torch.ones(ROWS, WIDTH, dtype=torch.bool), -math.inf).softmax(-1)


def softmax_of_infinity(y):
    return (y * 1e38 * 1e38).softmax(-1)


@pytest.mark.parametrize(("function", "what", "op"), [
    (logarithm, "the loss", "log"),
    (root, "the gradient of 'weight'", "div"),
    (softmax_of_rows_without_keys, "the loss", "_softmax"),
    (softmax_of_infinity, "the loss", "mul"),
])  # fmt: skip
def test_a_step_without_a_finite_loss_is_refused(function, what, op):
    with pytest.raises(CalibrationError, match=(
        rf"{what} is NaN or Inf.*begins at node '{op}\w*' \(aten\.{op}\.\w+, {line_of(function)}.*"
        rf"\d+ of {ROWS * WIDTH} values.*finite or masked. Remedy: ")):
        step(function)


def test_what_is_given_is_named():
    model, x = nn.Linear(WIDTH, 2), torch.ones(ROWS, WIDTH)
    x[0, 0] = math.nan
    with pytest.raises(CalibrationError, match=r"input '\w+': 1 of 48 values.*pass finite"):
        scaleprop.analyze(model, x, loss_fn=mean_square)
    with torch.no_grad():
        model.weight[0] = math.inf
    with pytest.raises(CalibrationError, match=r"parameter 'weight': 8 of 16 values"):
        scaleprop.analyze(model, torch.ones(ROWS, WIDTH), loss_fn=mean_square)


def test_the_first_of_an_operators_results_is_named():
    def norm(y):
        return F.layer_norm(y * 1e30, (WIDTH,), eps=0.0).double()

    with pytest.raises(CalibrationError, match=r"begins at node '\w+' \(aten\.native_layer_norm"):
        step(norm)


def test_half_of_float16s_range_and_beyond_is_no_mask():
    report = step(lambda y: y * 2.0**-16, torch.half, 22000.0)
    made = (_same_draw().half() @ (torch.eye(WIDTH) * 22000).half()).double()
    assert made.isfinite().all() and float((made.abs() >= 32752).double().mean()) > 0.1
    seen = row(report, "mm.default")
    assert seen.amax == float(made.abs().max()) and seen.masked == seen.nonfinite == 0
    assert seen.rms == pytest.approx(float(made.square().mean().sqrt()))
    assert seen.overflow["e4m3"] == float((made.abs() > 448).sum() / (made != 0).sum())
    assert any(flag.startswith("e4m3 ↑") for flag in seen.flags)
    assert not overflow(report)


def _same_draw() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH)


def test_overflow_that_is_clamped_is_found():
    report = step(lambda y: y.clamp(-1, 1), torch.half, 60000.0)
    made = (_same_draw().half() @ (torch.eye(WIDTH) * 60000).half())
    seen, bad = row(report, "mm.default"), float((~made.isfinite()).double().mean())
    assert bad > 0 and seen.nonfinite == bad and seen.masked == 0
    assert seen.amax == float(made[made.isfinite()].double().abs().max())
    assert seen.overflow["f16"] == pytest.approx(bad) and seen.flags[0].startswith("NaN or Inf ")
    (found,) = overflow(report)
    assert found.warning and "aten.mm.default" in found.message and found.figures["share"][0] == bad
    assert report.lost()["f16"][1] == report.lost()["bf16"][1] == 1
    assert ScaleReport.from_dict(report.to_dict()) == report


def test_minus_infinity_that_masks_nothing_is_an_overflow():
    report = step(lambda y: torch.log(y.relu()).exp().detach() + y)
    seen = row(report, "log.default")
    assert seen.nonfinite == float((_same_draw() <= 0).double().mean()) and seen.masked == 0
    assert overflow(report)


def test_infinity_that_nothing_learned_leads_to_is_told_without_a_warning():
    def run(y):
        places = torch.log(torch.arange(WIDTH, dtype=y.dtype))  # −∞, then left out
        return y + torch.where(torch.arange(WIDTH) < 1, 0.0, places)

    (found,) = overflow(step(run))
    assert not found.warning and found.figures["share"] == (1 / WIDTH,)


def attend(low: float, how: str):
    """Attention of x·w to itself, later rows hidden by ``low``; scores are [1, ROWS, ROWS]."""

    def run(y):
        scores = (y @ y.mT)[None] / WIDTH
        hidden = HIDDEN.to(y.device)
        if how == "filled":
            scores = scores.masked_fill(hidden, low)
        elif how == "where":
            scores = torch.where(hidden, low, scores)
        elif how == "added":
            scores = scores + torch.full((ROWS, ROWS), low, dtype=y.dtype).triu(1)
        else:
            mask = torch.zeros(1, 1, ROWS, ROWS, dtype=y.dtype).masked_fill(hidden, low)
            return F.scaled_dot_product_attention(*[y[None, None]] * 3, attn_mask=mask)
        return scores.softmax(-1) @ y

    return run


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float])
@pytest.mark.parametrize("kind", ["-inf", "finfo.min"])
@pytest.mark.parametrize("how", ["filled", "where", "added", "fused"])
def test_masks_of_attention_are_no_overflow(how, kind, dtype):
    low = -math.inf if kind == "-inf" else torch.finfo(dtype).min
    if how == "added" and kind == "-inf":
        how = "filled"
    report = step(attend(low, how), dtype)
    assert not overflow(report) and not any(t.nonfinite for t in report.tensors)
    share = float(HIDDEN.double().mean())
    masked = [t for t in report.of_phase("forward") if t.masked]
    assert masked and all(t.amax < 100 for t in report.of_phase("forward"))
    assert share in [t.masked for t in masked]
    assert not any(t.overflow["f16"] for t in report.tensors)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.half).min])
def test_scores_that_overflow_below_a_mask_are_found(low):
    first = torch.arange(WIDTH) == 0

    def run(y):
        return (y * -y).masked_fill(first, low).softmax(-1) @ y.mT  # −y² is beyond float16

    report = step(run, torch.half, 200.0)
    y = _same_draw().half() @ (torch.eye(WIDTH) * 200).half()
    bad = (~(y * -y).isfinite()).double()
    (found,) = overflow(report)
    assert found.figures["share"][0] == float(bad.mean()) > 0.1
    assert row(report, "mul.Tensor").nonfinite == float(bad.mean())
    assert row(report, "masked_fill.Scalar").masked >= 1 / WIDTH


def test_masks_that_are_cast_are_masks():
    lowest = torch.finfo(torch.half).min
    report = step(lambda y: y.masked_fill(torch.arange(WIDTH) == 0, lowest).float().softmax(-1),
                  torch.half)
    cast = [t for t in report.of_phase("forward") if t.op == "aten._to_copy.default"]
    assert cast[0].dtype == "float32" and cast[0].masked == 1 / WIDTH and cast[0].amax < 100


def test_lines_of_masks_have_the_size_of_what_is_not_masked():
    report = step(attend(torch.finfo(torch.float).min, "filled"))
    line = inspect.getsourcelines(attend)[1]
    text = inspect.getsource(attend).splitlines()
    (place,) = [n for n, code in enumerate(text) if "scores = scores.masked_fill" in code]
    (visit,) = [v for v in report.visits if v.line == line + place]
    y = _same_draw()
    scores = (y @ y.mT / WIDTH)[~HIDDEN].double()
    assert visit.forward == pytest.approx(float(scores.square().mean().sqrt()), rel=1e-5)
