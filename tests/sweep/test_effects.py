"""Main effects of a grid, on made-up losses that they can be worked out from."""

from __future__ import annotations

import io
import itertools
import json
import math

import pytest
from rich.console import Console

from scaleprop.errors import ConfigError
from scaleprop.recipes.training import OPERANDS, Operand, TrainingRecipe
from scaleprop.sweeps.results import Mean, Point, Sweep
from scaleprop.sweeps.runs import Outcome
from scaleprop.sweeps.tables import effect_rows, show

RECIPE = TrainingRecipe(name="made-up", description="",
                        operands=dict.fromkeys(OPERANDS[:6], Operand(format="mxfp8")))


def point(axes: dict[str, str], *losses: float) -> Point:
    outcomes = {seed: Outcome("done" if math.isfinite(loss) else "diverged", (), loss)
                for seed, loss in enumerate(losses)}
    return Point(axes, RECIPE, None, outcomes, Mean.of(losses), Mean.of(losses), 0.0)


def sweep_of(*points: Point) -> Sweep:
    return Sweep({}, (0, 1), None, points, ())


def test_effects_that_multiply_are_found_exactly():
    """A loss that is a product of one factor for each axis: pairs agree, and say the factor."""
    formats = {"a": 1.0, "b": 1.5, "c": 0.75}
    roundings = {"nearest": 2.0, "stochastic": 2.5}
    grid = [point({"format": one, "rounding": other}, formats[one] * roundings[other],
                  3 * formats[one] * roundings[other])
            for one, other in itertools.product(formats, roundings)]
    found = sweep_of(*grid).effects()
    assert [(each.axis, each.value, each.against) for each in found] == [
        ("format", "b", "a"), ("format", "c", "a"), ("rounding", "stochastic", "nearest")]
    assert [each.percent.value for each in found] == pytest.approx([50.0, -25.0, 25.0])
    assert [each.percent.count for each in found] == [4, 4, 6]  # two seeds of each pair
    assert all(each.percent.error == pytest.approx(0.0, abs=1e-9) for each in found)


def test_the_error_is_that_of_the_mean_over_pairs():
    grid = [point({"x": "0", "y": "0"}, 1.0), point({"x": "1", "y": "0"}, 1.1),
            point({"x": "0", "y": "1"}, 2.0), point({"x": "1", "y": "1"}, 2.6)]
    effect = sweep_of(*grid).effects()[0]
    assert effect.percent.value == pytest.approx(20.0)  # of 10 and 30
    assert effect.percent.error == pytest.approx(10.0)


def test_effects_within_a_value_show_what_depends_on_it():
    grid = [point({"x": "0", "y": "0"}, 1.0), point({"x": "1", "y": "0"}, 1.1),
            point({"x": "0", "y": "1"}, 2.0), point({"x": "1", "y": "1"}, 2.6)]
    changes = {y: [each.percent.value for each in sweep_of(*grid).effects({"y": y})]
               for y in ("0", "1")}
    assert changes == {"0": pytest.approx([10.0]), "1": pytest.approx([30.0])}
    with pytest.raises(ConfigError, match=r"no combination has \{'y': '2'\}; axes: x, y"):
        sweep_of(*grid).effects({"y": "2"})


def test_what_diverged_has_no_partner_or_did_not_run_does_not_count():
    grid = [point({"x": "0", "y": "0"}, 1.0, 1.0), point({"x": "1", "y": "0"}, 1.2, math.inf),
            point({"x": "0", "y": "1"}, math.inf, 1.0), point({"x": "1", "y": "1"}, 1.0),
            point({"x": "1", "y": "2"}, 9.0)]
    effect = sweep_of(*grid).effects()[0]
    assert effect.percent.value == pytest.approx(20.0)
    assert (effect.percent.count, effect.diverged) == (1, 2)
    assert effect_rows(sweep_of(*grid))[0] == ("x", "1", "0", "+20.00%", "1, 2 diverged")
    assert sweep_of(point({"x": "0"}, 1.0), point({"x": "1"})).effects()[0].percent.count == 0


def test_losses_below_zero_and_of_zero():
    """Less is better whatever the sign, and nothing is a part of zero."""
    effect = sweep_of(point({"x": "0"}, -2.0, 0.0), point({"x": "1"}, -3.0, 1.0)).effects()[0]
    assert (effect.percent.value, effect.percent.count) == (-50.0, 1)


def test_tables_and_json_show_them():
    grid = sweep_of(point({"x[": "0"}, 2.0, 2.0), point({"x[": "1"}, 1.0, 1.2))
    row = "| x[ | 1 | 0 | -45.00% ± 5.00 | 2 |"
    assert row in grid.table()
    screen = io.StringIO()
    show(grid, Console(width=200, file=screen))
    assert "-45.00% ± 5.00" in screen.getvalue()
    assert json.loads(json.dumps(grid.to_dict(), allow_nan=False))["effects"] == [
        {"axis": "x[", "value": "1", "against": "0", "percent": pytest.approx(-45.0),
         "error": pytest.approx(5.0), "pairs": 2, "diverged": 0}]
    assert "What a change does" not in sweep_of(point({}, 1.0)).table()
