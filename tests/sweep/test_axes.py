"""Combinations: what an axis changes, what is skipped and why, what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from scaleprop.errors import ConfigError
from scaleprop.recipes.training import OPERANDS, Operand, Phase, TrainingRecipe
from scaleprop.sweeps.axes import combinations, digest, label_of

MX = Operand(format="mxfp4")
BASE = TrainingRecipe(name="base", description="", operands=dict.fromkeys(OPERANDS[:6], MX))


def test_the_grid_is_the_product_of_the_axes():
    axes = {"dgrad.dy.rounding,wgrad.dy.rounding": ["nearest", "stochastic:8"],
            "high": [(), ("head",), ("head", "last:2")], "convolutions": [False, True]}
    found = combinations(BASE, axes)
    assert [tuple(each.axes.values()) for each in found] == list(itertools.product(
        ("nearest", "stochastic:8"), ("none", "head", "head+last:2"), ("no", "yes")))
    for each in found:
        assert each.recipe is not None
        rounding = each.axes["dgrad.dy.rounding,wgrad.dy.rounding"]
        expected = {role: dataclasses.replace(MX, rounding=rounding)
                    if role in ("dgrad.dy", "wgrad.dy") else MX for role in OPERANDS[:6]}
        assert dict(each.recipe.operands) == expected
        assert each.recipe.convolutions is (each.axes["convolutions"] == "yes")
    assert len({digest(each.recipe) for each in found if each.recipe}) == len(found)


def test_patterns_change_what_the_recipe_has():
    (found,) = combinations(BASE, {"*.format": ["mxfp8"]})
    assert found.recipe is not None and set(found.recipe.operands) == set(OPERANDS[:6])
    assert {each.format for each in found.recipe.operands.values()} == {"mxfp8"}
    (found,) = combinations(BASE, {"wgrad.*.hadamard": [32]})
    assert found.recipe is not None
    assert {role for role, each in found.recipe.operands.items() if each.hadamard == 32} == {
        "wgrad.dy", "wgrad.x"}


def test_operands_are_set_replaced_and_taken_out():
    found = combinations(BASE, {"attention.x": ["high", "mxfp8", {"format": "mxfp8",
                                                                  "rounding": "stochastic"}]})
    kept = [each.recipe.operands.get("attention.x") for each in found if each.recipe]
    assert kept == [None, Operand(format="mxfp8"),
                    Operand(format="mxfp8", rounding="stochastic")]
    (found,) = combinations(BASE, {"fprop.*": [None]})
    assert found.recipe is not None and not {"fprop.x", "fprop.w"} & set(found.recipe.operands)


def test_changes_are_made_at_once():
    """Signs without a rotation are no operand, and a rotation of one factor no product."""
    rotated = BASE.replace(**{f"wgrad.{side}": dataclasses.replace(MX, hadamard=16, signs="step")
                              for side in ("dy", "x")})
    axes = {"rotation": {"none": {"wgrad.*.hadamard": 0, "wgrad.*.signs": "none"},
                         "32": {"wgrad.*.hadamard": 32}}}
    none, larger = combinations(rotated, axes)
    assert none.recipe is not None and none.recipe.operands == BASE.operands
    assert larger.recipe is not None and larger.recipe.operands["wgrad.x"].hadamard == 32
    assert larger.recipe.operands["wgrad.x"].signs == "step"


def test_the_recipe_is_an_axis():
    other = BASE.replace(name="other", **{"fprop.x": None})
    found = combinations(BASE, {"recipe": [BASE, other, "bf16"], "high": [(), ("head",)]})
    assert [each.axes["recipe"] for each in found] == ["base"] * 2 + ["other"] * 2 + ["bf16"] * 2
    assert found[2].recipe is not None and "fprop.x" not in found[2].recipe.operands


def test_what_is_no_recipe_is_listed_with_the_reason():
    found = combinations(BASE, {"wgrad.x.hadamard": [0, 16], "fprop.x.format": ["mxfp4", "mxfp5"]})
    assert [each.recipe is None for each in found] == [False, True, True, True]
    assert "mxfp5" in found[1].reason and "rotated differently" in found[2].reason
    with pytest.raises(ConfigError, match=r"none of 2 combinations is a valid recipe.*rotated"):
        combinations(BASE, {"wgrad.x.hadamard": [16, 32]})


def test_phases_may_be_plain_data():
    (found,) = combinations(BASE, {"phases": [[{"start": 5, "operands": {"dgrad.dy": "high"}}]]})
    assert found.recipe is not None
    assert found.recipe.phases == (Phase(start=5, operands={"dgrad.dy": None}),)
    with pytest.raises(ConfigError, match="is no phase"):
        combinations(BASE, {"phases": [[{"begin": 5}]]})


@pytest.mark.parametrize(("axes", "message"), [
    ({"dgrad.dy.colour": ["red"]}, "nothing of a recipe is called 'dgrad.dy.colour'; known"),
    ({"rounding": ["nearest"]}, "nothing of a recipe is called 'rounding'"),
    ({"*.rounding,fprop.z.rounding": ["nearest"]}, "called 'fprop.z.rounding'"),
    ({"g": {"a": {"fprop.q": 1}}}, "called 'fprop.q'"),
    ({"g": {"a": 3}}, "'a' is 3, not a table of changes"),
    ({"*.format": "mxfp4"}, "a list of values is wanted"),
    ({"*.format": []}, "has no values"),
    ({"g": {}}, "has no values"),
    ({"*.format": ["mxfp4", "mxfp4"]}, "values that look alike: mxfp4, mxfp4"),
    ({"*.format": ["mxfp4"], "fprop.x.format": ["mxfp8"]}, "both change fprop.x.format"),
    ({"fprop.x": [3]}, "3 is no operand"),
])
def test_axes_that_make_no_sense_are_refused(axes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        combinations(BASE, axes)  # type: ignore[arg-type]


def test_names_do_not_tell_recipes_apart():
    assert digest(BASE) == digest(BASE.replace(name="x", description="y", source="z"))
    assert digest(BASE) != digest(BASE.replace(high=()))
    assert digest(BASE) == digest(TrainingRecipe.from_dict(BASE.to_dict()))


def test_labels_are_short():
    labels = {0.75: "0.75", None: "high", 16: "16", (): "none",
              Operand(format="mxfp4", hadamard=16): "mxfp4 hadamard=16"}
    assert {value: label_of(value) for value in labels} == labels
