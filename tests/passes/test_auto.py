"""recipe="auto": what is tried, what is chosen, and what the report says of it."""

from __future__ import annotations

import pytest
import torch

import scaleprop
from scaleprop.errors import CalibrationError, ConfigError, PassError, PostconditionError
from scaleprop.passes import auto
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.auto import Auto
from scaleprop.passes.auto.chains import together
from scaleprop.passes.auto.emulation import outputs_of, score
from scaleprop.passes.base import PassManager, relative_error, run_as_is
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import named_recipe
from scaleprop.report import Report
from scaleprop.report.records import TransformRecord
from tests.passes.transforms.toys import TOYS, shuffled

CHAINS = ("", "smooth", "fold-norms+rotate")


def planted(name="untied"):
    """A toy with channels that stand out in its stream."""
    make, inputs = TOYS[name]
    model = shuffled(make())
    with torch.no_grad():
        for norm, readers in ((model.n1, (model.ask, model.both)), (model.n2, (model.gu,))):
            norm.gain[3] *= 80
            for reader in readers:
                reader.weight[:, 3] /= 80
    return model, inputs


@pytest.fixture(scope="module")
def chosen():
    model, inputs = planted()
    spelled = ",".join(f'"{chain}"' for chain in CHAINS)
    return scaleprop.compile(
        model, inputs, recipe="int4-int4", backend="reference", calibration=[inputs] * 3,
        passes=[f"auto{{chains=[{spelled}], batches=2}}"], verify=True)  # fmt: skip


def test_the_best_is_chosen_and_all_are_reported(chosen, tmp_path):
    trials = chosen.report.trials
    assert {trial.chain for trial in trials} >= set(CHAINS)
    errors = {trial.chain: trial.error for trial in trials}
    best = [trial for trial in trials if trial.chosen]
    assert len(best) == 1 and best[0].error == min(errors.values())
    assert best[0].error < errors[""] / 4
    chosen.report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == chosen.report
    chosen.report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Chains tried" in page and "fold-norms+rotate" in page
    assert any("auto: chosen" in note for note in chosen.report.notes)


def test_what_was_chosen_is_saved(chosen, tmp_path):
    chosen.save(tmp_path / "model")
    assert scaleprop.load(tmp_path / "model").report.trials == chosen.report.trials


def test_the_name_auto_takes_the_formats_of_its_target():
    model, inputs = planted()
    made = scaleprop.compile(model, inputs, recipe="auto", target="int8-token",
                             backend="reference", calibration=[inputs])  # fmt: skip
    assert made.recipe.name == "int8-token" and len(made.report.trials) > 3


def test_static_scales_are_searched_at_the_end_of_each_chain():
    model, inputs = planted()
    program = capture(model, inputs, {}, None)
    dynamic, static = (auto.portfolio(PassManager([AssignFormats(named_recipe(name))]).run(program))
                       for name in ("int4-int4", "int4-int4-static"))
    assert dynamic == auto.PORTFOLIO
    assert static == ("", "merge-quant", *(f"{chain}+merge-quant" for chain in dynamic[1:]))


def test_errors_are_those_of_the_compiled_program():
    """The emulation and the program that is made of it agree."""
    model, inputs = planted()
    program = capture(model, inputs, {}, None)
    steps = build(named_recipe("int4-int8-token"), calibration=[inputs]).passes
    at = [step.name for step in steps].index("calibrate")
    assigned = PassManager([*steps[:at], Calibrate(data=[inputs])]).run(program)
    batches = [assigned.example_leaves]
    expected = outputs_of(assigned, batches)
    emulated = score(assigned, batches, expected)
    compiled = PassManager(steps).run(program)
    got = run_as_is(compiled)
    want = expected[0][0].double()
    exact = float((got.double() - want).square().sum() / want.square().sum())
    assert emulated.error == pytest.approx(exact, rel=1e-3) and exact > 0
    assert relative_error(got, want) > 0
    assert set(emulated.local) == {node.name for node in assigned.module.graph.nodes
                                   if "scaleprop.assignment" in node.meta}


def test_operators_that_a_transform_ties_are_decided_together():
    class Tied:
        def __init__(self, *readers):
            self.transforms = tuple(TransformRecord(by="x", kind="scale", seed="s", readers=names)
                                    for names in readers)

    found = together([Tied(("a", "b")), Tied(("b", "c"), ("d",))], "abcde")
    assert sorted(map(sorted, found)) == [["a", "b", "c"], ["d"], ["e"]]


def test_what_makes_no_sense_is_refused():
    model, inputs = planted()
    with pytest.raises(ConfigError, match="target='int4'"):
        scaleprop.compile(model, inputs, recipe="auto", calibration=[inputs])
    with pytest.raises(ConfigError, match="goes with recipe='auto'"):
        scaleprop.compile(model, inputs, recipe="int8", target="int4")
    with pytest.raises(CalibrationError, match="auto measures"):
        scaleprop.compile(model, inputs, recipe="auto", target="int4")
    with pytest.raises(ConfigError, match="'smoth' is no method"):
        Auto(chains=("smoth",))
    with pytest.raises(ConfigError, match="at least one"):
        Auto(batches=0)


@pytest.mark.parametrize("kind", [PassError, PostconditionError])
def test_a_chain_that_fails_is_noted_and_a_broken_promise_is_raised(kind, monkeypatch):
    run = auto.run_chain

    def failing(program, chain, *args, **kwargs):
        if chain:
            raise kind("no room")
        return run(program, chain, *args, **kwargs)

    monkeypatch.setattr(auto, "run_chain", failing)
    model, inputs = planted()
    options = {"recipe": "int4-int4", "backend": "reference", "calibration": [inputs],
               "passes": ['auto{chains=["","smooth"], solve=false}']}
    if kind is PostconditionError:
        with pytest.raises(PostconditionError, match="no room"):
            scaleprop.compile(model, inputs, **options)
    else:
        notes = scaleprop.compile(model, inputs, **options).report.notes
        assert any("smooth cannot take this program: no room" in note for note in notes)
