"""Training recipes: what they may say, what they refuse, and the ones that ship."""

from __future__ import annotations

import json

import pytest

from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import parse
from scaleprop.formats.scaled import PLAIN
from scaleprop.recipes.training import OPERANDS, Operand, Phase, TrainingRecipe
from scaleprop.recipes.training_named import NAMED, training_recipe, truncated, with_tail

NVFP4 = training_recipe("nvfp4")
EDEN = training_recipe("nvfp4-quartet2")
SR = "stochastic_fastest:8"


def test_the_named_recipes_are_there():
    assert [recipe.name for recipe in NAMED] == [
        "fp32", "bf16", "fp8", "fp8-unscaled", "fp8-current", "fp8-delayed", "fp8-block",
        "fp8-amax", "fp8-cscale", "mus-fp8", "mxfp8", "mxfp6", "mxfp4-tseng", "mxfp4-tetrajet",
        "mxfp4-quartet", "nvfp4", "nvfp4-quartet2", "ue5m3", "fp4-all-the-way", "int4-cnn"]


@pytest.mark.parametrize("recipe", NAMED, ids=lambda r: r.name)
def test_a_named_recipe_survives_json_and_says_where_it_is_from(recipe: TrainingRecipe):
    assert TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.description and (recipe.source or recipe.name in ("fp32", "bf16", "fp8"))


# (role → format, rounding, rotation, signs, prescale), from numerics.md, section 5
SPECIFIED = {
    "nvfp4": {
        "fprop.x": ("e2m1[1x16]*e4m3*f32:exact", "nearest", 0, "none", 1),
        "fprop.w": ("e2m1[16x16]*e4m3*f32:exact", "nearest", 0, "none", 1),
        "dgrad.dy": ("e2m1[1x16]*e4m3*f32:exact", SR, 0, "none", 1),
        "dgrad.w": ("e2m1[16x16]*e4m3*f32:exact", "nearest", 0, "none", 1),
        "wgrad.dy": ("e2m1[1x16]*e4m3*f32:exact", SR, 16, "fixed", 1),
        "wgrad.x": ("e2m1[1x16]*e4m3*f32:exact", "nearest", 16, "fixed", 1)},
    "mxfp4-tseng": dict.fromkeys(
        ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"),
        ("e2m1[1x32]*e8m0:floor", "stochastic_fastest:16", 64, "step", 0.75)),
    "mxfp8": dict.fromkeys(OPERANDS[:6], ("e4m3[1x32]*e8m0:rceil", "nearest", 0, "none", 1)),
    "ue5m3": {
        "fprop.x": ("e2m1[1x16]*ue5m3*f32:exact", "nearest", 0, "none", 1),
        "fprop.w": ("e2m1[16x16]*ue5m3*f32:exact", "nearest", 0, "none", 1),
        "dgrad.dy": ("e2m1[1x16]*ue5m3*f32:exact", "stochastic_fast:8", 0, "none", 1),
        "dgrad.w": ("e2m1[16x16]*ue5m3*f32:exact", "nearest", 0, "none", 1),
        "wgrad.dy": ("e2m1[1x16]*ue5m3*f32:exact", "stochastic_fast:8", 0, "none", 1),
        "wgrad.x": ("e2m1[1x16]*ue5m3*f32:exact", "nearest", 0, "none", 1)},
}


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_named_recipe_is_what_its_source_specifies(name: str):
    found = {role: (parse(each.format).long_name, each.rounding, each.hadamard, each.signs,
                    each.prescale)
             for role, each in training_recipe(name).operands.items()}
    assert found == SPECIFIED[name]


def test_ue5m3_holds_its_tensor_scales_fifty_steps():
    assert {each.scaling for each in training_recipe("ue5m3").operands.values()} == {"held:50"}


@pytest.mark.parametrize("name", ["mxfp4-tetrajet", "mxfp4-quartet", "nvfp4-quartet2"])
def test_backward_operands_are_of_what_forward_multiplied(name: str):
    operands = training_recipe(name).operands
    assert [operands[role].of for role in ("dgrad.w", "wgrad.x", "dgrad.dy", "wgrad.dy")] == [
        "quantized", "quantized", "data", "data"]


@pytest.mark.parametrize("recipe", NAMED, ids=lambda r: r.name)
def test_gradients_of_four_bits_are_stochastic_and_forward_is_not(recipe: TrainingRecipe):
    for role, each in recipe.operands.items():
        four = each.format not in PLAIN and parse(each.format).element.name == "e2m1"
        assert each.stochastic == (four and (role.endswith(".dy") or each.of == "quantized"
                                             or recipe.name == "mxfp4-tseng"
                                             or (recipe.name, role)
                                             == ("fp4-all-the-way", "wgrad.x")))


def test_replace_changes_a_field_of_an_operand_an_operand_or_takes_it_out():
    changed = NVFP4.replace(name="mine", **{"dgrad.dy.rounding": "nearest", "wgrad.x": None,
                                            "wgrad.dy": None})
    assert changed.operands["dgrad.dy"] == Operand(format="nvfp4")
    assert set(NVFP4.operands) - set(changed.operands) == {"wgrad.x", "wgrad.dy"}
    assert changed.operands["fprop.x"] == NVFP4.operands["fprop.x"]
    assert NVFP4.replace(**{"fprop.x": Operand(format="mxfp8")}).operands["fprop.x"].format \
        == "mxfp8"


def test_phases_change_operands_from_a_step_on():
    recipe = with_tail(training_recipe("fp4-all-the-way"), 100)
    assert set(recipe.at(99)) == set(OPERANDS[:6])
    assert set(recipe.at(100)) == {"fprop.x", "fprop.w"} == set(recipe.at(10**6))
    later = recipe.replace(phases=(*recipe.phases, Phase(
        start=200, operands={"fprop.w": Operand(format="mxfp8")})))
    assert later.at(200)["fprop.w"].format == "mxfp8" and "dgrad.dy" not in later.at(200)


def test_an_element_format_truncates_every_tensor():
    assert training_recipe("e5m7") == truncated("e5m7") and truncated("e5m7").every == "e5m7"


@pytest.mark.parametrize(("make", "said"), [
    (lambda: training_recipe("nvfp5"), "did you mean 'nvfp4'"),
    (lambda: truncated("int8"), "no signed float element"),
    (lambda: Operand(format="nvfp9"), "nvfp9"),
    (lambda: Operand(format="nvfp4", rounding="up"), "unknown rounding 'up'"),
    (lambda: Operand(format="nvfp4", signs="some"), "signs='some'"),  # type: ignore[arg-type]
    (lambda: Operand(format="nvfp4", signs="step"), "signs go with a rotation"),
    (lambda: Operand(format="nvfp4", hadamard=-16), "hadamard=-16"),
    (lambda: Operand(format="nvfp4", prescale=1.5), "prescale=1.5"),
    (lambda: Operand(format="nvfp4", headroom=0.5), "headroom=0.5"),
    (lambda: Operand(format="nvfp4", scaling="held:0"), "scaling='held:0'"),
    (lambda: Operand(format="mxfp8", scaling="held:50"), "no scale of the whole tensor"),
    (lambda: Operand(format="bf16", scaling="static"), "no scale of the whole tensor"),
    (lambda: Operand(format="ternary", scaling="delayed:4"), "no scale of the whole tensor"),
    (lambda: Operand(format="nvfp4", of="both"), "of='both'"),  # type: ignore[arg-type]
    (lambda: Operand(format="nvfp4", hadamard=17), "block 17 is none of"),
    (lambda: Operand(format="int8+zp"), "zero points"),
    (lambda: Operand(format="bf16", rounding="stochastic:8"), "has no rounding='stochastic:8'"),
    (lambda: Operand(format="bf16", hadamard=16), "has no hadamard=16"),
    (lambda: Operand(format="ternary", estimator="absmax"), "use 'clipped'"),
    (lambda: EDEN.replace(**{"dgrad.dy.scaling": "held:5"}), "eden has no scaling='held:5'"),
    (lambda: EDEN.replace(**{"dgrad.dy.prescale": 0.75}), "eden has no prescale=0.75"),
    (lambda: EDEN.replace(**{"dgrad.dy.format": "mxfp4"}), "use nvfp4 or fp4_ue5m3"),
    (lambda: Operand(format="nvfp4", rounding="eden"), "groups of 0 are not whole blocks"),
    (lambda: TrainingRecipe(name="a", description="", every="int8"), "no signed float element"),
    (lambda: NVFP4.replace(convolutions=True), "rotations do not go through"),
    (lambda: Phase(start=0, operands={}), "step 1 or later"),
    (lambda: Phase(start=1, operands={"fprop.y": None}), "unknown roles"),
    (lambda: TrainingRecipe(name="a", description="", high=("tail",)), "high='tail'"),
    (lambda: TrainingRecipe(name="a", description="", operands={"x": Operand(format="mxfp8")}),
     "unknown roles"),
    (lambda: NVFP4.replace(**{"fprop.x.hadamard": 16}), "rotated differently"),
    (lambda: NVFP4.replace(**{"wgrad.x": None}), "rotated differently"),
    (lambda: NVFP4.replace(**{"fprop.x.of": "quantized"}), "cannot be of what fprop quantized"),
    (lambda: NVFP4.replace(**{"dgrad.dy.estimator": "clipped"}), "no gradient to estimate"),
    (lambda: NVFP4.replace(**{"dgrad.dy.color": 1}), "has no 'color'"),
    (lambda: Operand(format="nvfp4", estimator="clip"), "unknown estimator 'clip'"),
    (lambda: training_recipe("int4-cnn").replace(**{"fprop.x.format": "mxfp8"}), "no 'fprop.x'"),
    (lambda: NVFP4.replace(colour=1), "no such field"),
    (lambda: NVFP4.replace(every="e5m7"), "leaves no operands"),
    (lambda: NVFP4.replace(phases=(Phase(start=2, operands={}), Phase(start=2, operands={}))),
     "one after another"),
    (lambda: TrainingRecipe.from_dict({"schema_version": 9}), "schema_version 9"),
    (lambda: TrainingRecipe.from_dict({"schema_version": 1, "colour": 1}), "not a training recipe"),
])
def test_what_does_not_go_together_is_refused(make, said: str):
    with pytest.raises((ConfigError, FormatError), match=said.replace("[", r"\[")):
        make()
