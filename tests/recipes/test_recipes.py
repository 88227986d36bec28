"""Recipes are plain values: they parse, print, save, load, and refuse nonsense by name."""

from __future__ import annotations

import json

import pytest

from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import parse
from scaleprop.recipes import (
    Recipe,
    Role,
    load_recipe,
    named_recipe,
    named_recipes,
    save_recipe,
)

EXPECTED = {
    "int8", "int8-dynamic", "int8-token", "int8-weight", "int4", "int4-g32", "int4-int8", "fp8",
    "fp8-weight", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "mxfp8-weight", "mxfp6-weight",
    "mxfp4-weight", "nvfp4-weight",
}  # fmt: skip


def test_the_named_recipes_are_there():
    names = [recipe.name for recipe in named_recipes()]
    assert set(names) >= EXPECTED and len(names) == len(set(names))


@pytest.mark.parametrize("recipe", named_recipes(), ids=lambda r: r.name)
def test_round_trips(recipe, tmp_path):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert named_recipe(save_recipe(recipe, tmp_path / "r.json")) == recipe
    assert named_recipe(recipe.name) is recipe
    assert named_recipe(recipe) is recipe


@pytest.mark.parametrize("recipe", named_recipes(), ids=lambda r: r.name)
def test_meaning(recipe):
    if recipe.name not in EXPECTED:
        return
    assert recipe.needs_calibration == (recipe.name == "int8")
    assert ("fprop.x" in recipe.roles) != (
        recipe.name.endswith("-weight") or recipe.name in ("int4", "int4-g32"))  # fmt: skip
    assert parse(recipe.roles["embedding"].format).bits == 8
    for key in ("fprop.w", "conv.w"):  # free in INT4 kernels, a correction in INT8 ones
        weight = parse(recipe.roles[key].format)
        assert weight.zero_point == (weight.element.name == "int4")


def test_unknown_name_lists_close_ones():
    with pytest.raises(ConfigError, match=r"unknown recipe 'mxpf4'; did you mean 'mxfp4'"):
        named_recipe("mxpf4")


def test_toml(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\ndescription = "d"\n[roles]\n'
                    '"fprop.w" = {format = "int4[1x64]*f16", clipping = "mse"}\n')  # fmt: skip
    recipe = load_recipe(file)
    assert recipe.roles == {"fprop.w": Role(format="int4[1x64]*f16", clipping="mse")}
    assert named_recipe(str(file)) == recipe


BAD = {
    '{"schema_version": 1, "name": "x"}': "not a recipe: 'roles'",
    '{"schema_version": 7}': "schema_version 7; this version reads 1",
    "{": "is not valid JSON",
    "[" * 100_000: "is not valid JSON",
    "[]": "expected a table",
    '{"schema_version": 1, "name": "x", "description": "", "roles": {}, "color": 1}': "color",
    '{"schema_version": 1, "name": "x", "description": "", "roles": {"w": {"format": "int8"}}}':
        "unknown roles ['w']",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_files(text, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert BAD[text] in str(caught.value)


def test_missing_file_and_wrong_suffix(tmp_path):
    with pytest.raises(ConfigError, match="cannot read recipe"):
        named_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"written as \.json"):
        save_recipe(named_recipe("int8"), tmp_path / "r.toml")


def test_roles_are_checked_when_made():
    with pytest.raises(FormatError, match="unknown format 'int9'"):
        Role(format="int9")
    with pytest.raises(ConfigError, match="scaling='sometimes'; known: dynamic, static"):
        Role(format="int8", scaling="sometimes")


def test_replace_makes_another():
    recipe = named_recipe("int8").replace(name="mine")
    assert recipe.name == "mine" and named_recipe("int8").name == "int8"


WEIGHTS, ACTIVATIONS = {"fprop.w", "conv.w", "embedding"}, {"fprop.x", "conv.x"}
ALLOWED = {
    ("rounding", "nearest"): WEIGHTS | ACTIVATIONS,
    ("rounding", "stochastic"): WEIGHTS,
    ("rounding", "compensated"): {"fprop.w"},
    ("scaling", "dynamic"): WEIGHTS | ACTIVATIONS,
    ("scaling", "static"): ACTIVATIONS,
    ("clipping", "amax"): WEIGHTS | ACTIVATIONS,
    ("clipping", "mse"): WEIGHTS,
}


@pytest.mark.parametrize("key", sorted(WEIGHTS | ACTIVATIONS))
@pytest.mark.parametrize(("option", "value"), ALLOWED)
def test_roles_take_the_options_that_mean_something_there(key, option, value):
    roles = {key: Role(format="int8", **{option: value})}
    if key in ALLOWED[option, value]:
        assert Recipe(name="r", description="", roles=roles).roles == roles
        return
    with pytest.raises(ConfigError, match=rf"{option}='{value}' is for .* not for '{key}'; use "):
        Recipe(name="r", description="", roles=roles)
