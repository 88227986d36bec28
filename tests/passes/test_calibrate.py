"""Calibration: every way to give data, what is refused, and that nothing is kept alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from scaleprop.calibration.observer import Observer, Tally
from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.calibrate import Calibrate, channel_axes, watched_nodes
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.recipes import named_recipe

BATCHES = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 5)]


def prepared(model, *args, recipe="int8", **kwargs):
    program = capture(model, args, kwargs)
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=named_recipe(recipe))):
        program = step.run(program).program
    return program


def test_statistics_are_those_of_the_data(mlp):
    program = Calibrate(data=BATCHES).run(prepared(mlp, BATCHES[0])).program
    seen = program.statistics["x"]
    assert seen.count == 10 * 64 and seen.batches == 3
    assert seen.amax == float(torch.cat(BATCHES).abs().max())
    assert set(program.statistics) == watched_nodes(program)
    hidden = next(s for name, s in program.statistics.items() if name != "x")
    with torch.no_grad():
        want = [nn.functional.silu(mlp.gate(x)) * mlp.up(x) for x in BATCHES]
    assert hidden.max == pytest.approx(float(torch.cat(want).max()), rel=1e-6)


FORMS = {
    "tensors": lambda: BATCHES,
    "tuples": lambda: [(x,) for x in BATCHES],
    "dicts": lambda: [{"x": x} for x in BATCHES],
    "args and kwargs": lambda: [((), {"x": x}) for x in BATCHES],
    "generator": lambda: (x for x in BATCHES),
    "function": lambda: lambda model: [model(x) for x in BATCHES],
    "function by keyword": lambda: lambda model: [model(x=x) for x in BATCHES],
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_every_form_of_data(mlp, data):
    program = Calibrate(data=data()).run(prepared(mlp, BATCHES[0])).program
    assert program.statistics["x"].count == 640


def test_function_gets_the_models_outputs(tied, ids):
    outputs = []
    Calibrate(data=lambda model: outputs.append(model(ids))).run(prepared(tied, ids))
    assert outputs[0]["cache"] is None
    torch.testing.assert_close(outputs[0]["logits"], tied(ids)["logits"])


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_not_finite_is_refused_with_place_and_batch(mlp, value, word):
    bad = BATCHES[1].clone()
    bad[0, 3] = value
    with pytest.raises(CalibrationError, match=rf"node 'x' .* is {word} in calibration batch 1 "):
        Calibrate(data=[BATCHES[0], bad]).run(prepared(mlp, BATCHES[0]))


def test_inner_nan_names_operator_and_line(tied, ids):
    tied.norm.weight.data[0] = float("nan")
    message = r"(?s)aten\.layer_norm\.default, .*conftest\.py:\d+ in forward.* is NaN"
    with pytest.raises(CalibrationError, match=message):
        Calibrate(data=[ids]).run(prepared(tied, ids))


@pytest.mark.parametrize("data", [[], iter(()), lambda model: None])
def test_empty_data_is_refused(mlp, data):
    with pytest.raises(CalibrationError, match="calibration data was empty"):
        Calibrate(data=data).run(prepared(mlp, BATCHES[0]))


def test_no_data_is_refused(mlp):
    with pytest.raises(CalibrationError, match="no calibration data"):
        Calibrate().run(prepared(mlp, BATCHES[0]))


WRONG = {
    "other name": ({"y": BATCHES[0]}, r"batch 0 .*missing \['x'\], unexpected \['y'\]"),
    "too many": ((BATCHES[0], BATCHES[0]), r"arguments \['x'\]: .*1 too many by position"),
    "shape": (torch.randn(2, 63), r"'x': expected shape \[batch, 64\] .*got \[2, 63\]"),
    "dtype": (torch.ones(2, 64, dtype=torch.int64), "'x': expected torch.float32, got torch.int64"),
    "not a tensor": ("text", "batch 0 .*not str"),
}


@pytest.mark.parametrize(("batch", "message"), WRONG.values(), ids=WRONG)
def test_wrong_structure_names_expected_and_given(mlp, batch, message):
    with pytest.raises(CalibrationError, match=f"(?s){message}"):
        Calibrate(data=[batch]).run(prepared(mlp, BATCHES[0]))


def test_interruption_leaves_the_program_as_it_was(mlp):
    program = prepared(mlp, BATCHES[0])

    def interrupted():
        yield BATCHES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibrate(data=interrupted()).run(program)
    assert program.statistics == {}


def test_nothing_to_do_for_dynamic_recipes(mlp):
    result = Calibrate(data=BATCHES).run(prepared(mlp, BATCHES[0], recipe="int8-dynamic"))
    assert not result.modified and "no scale is static" in result.notes[0]


def test_activations_die_as_soon_as_they_are_read(mlp):
    """While the last linear runs, the first one's output is gone."""
    program = prepared(mlp, BATCHES[0])
    alive: list[weakref.ref] = []

    class Watching(Observer):
        def run_node(self, n):
            value = super().run_node(n)
            if n.target is torch.ops.aten.linear.default:
                if len(alive) == 2:
                    gc.collect()
                    assert [ref() for ref in alive] == [None, None]
                alive.append(weakref.ref(value))
            return value

    watched = {name: Tally().add for name in watched_nodes(program)}
    Watching(program.module, watched).observe([BATCHES[0]])
    assert len(alive) == 3


def test_progress_goes_to_standard_error(mlp, capsys):
    Calibrate(data=BATCHES, progress=True).run(prepared(mlp, BATCHES[0]))
    assert capsys.readouterr().out == ""


def test_channels_lie_along_the_contraction_axis(convnet, mlp):
    image = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    program = Calibrate(data=[image, 2 * image], everything=True, channels=True, sample=40).run(
        prepared(convnet, image, recipe="int8-dynamic")).program
    axes = channel_axes(program)
    assert axes["image"] == -3 and set(axes.values()) == {-3, -1}
    assert set(axes) == watched_nodes(program, everything=True)
    seen = program.statistics["image"]
    pixels = torch.cat([image, 2 * image]).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(seen.channel_amax, pixels.abs().amax(0))
    torch.testing.assert_close(seen.channel_mean_abs, pixels.double().abs().mean(0))
    assert seen.sample.shape == (40, 3)
    assert (seen.sample[:, None] == pixels).all(-1).any(1).all()  # they are rows of the data


def test_linears_decide_over_other_products_that_read_the_same():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            y = x * 2
            return torch.matmul(y.transpose(-1, -2).softmax(-1), y), self.linear(y)

    program = capture(Both(), (torch.randn(2, 9, 6),), {})
    matmul = torch.ops.aten.matmul.default
    (product,) = [node for node in program.module.graph.nodes if node.target is matmul]
    assert channel_axes(program)[product.args[1].name] == -1  # the product sums it over -2


def test_samples_are_aligned_bounded_and_the_same_every_time(mlp):
    def sampled(seed):
        return Calibrate(data=BATCHES, everything=True, sample=4, seed=seed).run(
            prepared(mlp, BATCHES[0])).program.statistics

    first, again, other = sampled(0), sampled(0), sampled(1)
    hidden = next(name for name in first if name != "x")
    assert all(torch.equal(first[name].sample, again[name].sample) for name in first)
    assert not torch.equal(first["x"].sample, other["x"].sample)
    with torch.no_grad():
        x = first["x"].sample
        torch.testing.assert_close(first[hidden].sample,
                                   nn.functional.silu(mlp.gate(x)) * mlp.up(x))


def test_values_that_no_contraction_reads_are_watched_where_named(mlp):
    program = prepared(mlp, BATCHES[0], recipe="int8-dynamic")
    last = program.module.graph.output_node().all_input_nodes[0].name
    seen = Calibrate(data=BATCHES, watch={last: -2}).run(program).program.statistics
    assert set(seen) == {last} and seen[last].channel_amax is None  # batches of 2, 3 and 5
    seen = Calibrate(data=BATCHES, watch={last: -1}, channels=True).run(program).program.statistics
    with torch.no_grad():
        want = mlp(torch.cat(BATCHES)).amin(0)
    torch.testing.assert_close(seen[last].channel_min, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"watch": {"nobody": -1}}, "'nobody', which is no tensor"),
    ({"watch": {"x": 0}}, "axis 0 of 'x', of shape"),
    ({"watch": {"x": -3}}, "axis -3 of 'x'"),
    ({"watch": "x"}, "watch='x' is no mapping"),
    ({"sample": -1}, "sample=-1 is a number of rows"),
])  # fmt: skip
def test_what_cannot_be_watched_is_refused(mlp, options, message):
    with pytest.raises(ConfigError, match=message):
        Calibrate(data=BATCHES, **options).run(prepared(mlp, BATCHES[0]))
