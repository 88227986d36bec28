"""Recipes by name or from a file: TOML or JSON to read, JSON to write."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from scaleprop import durable
from scaleprop.errors import ConfigError
from scaleprop.recipes.base import SCHEMA_VERSION, Recipe
from scaleprop.recipes.named import NAMED


def named_recipes() -> tuple[Recipe, ...]:
    """The recipes that ship."""
    return NAMED


def named_recipe(recipe: str | Path | Recipe) -> Recipe:
    """The recipe meant by a name, a path to a ``.toml`` or ``.json`` file, or a recipe itself.

    >>> str(named_recipe("mxfp4").roles["fprop.w"].format)
    'mxfp4:even'

    Raises:
        ConfigError: on an unknown name (the close ones are listed), a file that is not a recipe, or
            another object.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a recipe is a name, a path or a scaleprop.Recipe, not "
                          f"{type(recipe).__name__}: scaleprop.prepare_training takes recipes for "
                          "training")
    if isinstance(recipe, Path) or recipe.endswith((".toml", ".json")):
        return load_recipe(recipe)
    known = {candidate.name: candidate for candidate in NAMED}
    if recipe in known:
        return known[recipe]
    close = difflib.get_close_matches(recipe, known, n=3, cutoff=0.4)
    meant = f"did you mean {', '.join(map(repr, close))}? " if close else ""
    raise ConfigError(
        f"unknown recipe {recipe!r}; {meant}known: {', '.join(known)}; or a path to a .toml or "
        ".json file"
    )


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML or JSON file. ``schema_version`` may be left out of a TOML file.

    Raises:
        ConfigError: where the file is missing, malformed, or not a recipe.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        data: Any = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read recipe {str(file)!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is not a recipe: expected a table of fields")
    if file.suffix == ".toml":
        data.setdefault("schema_version", SCHEMA_VERSION)
    return Recipe.from_dict(data)


def save_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Write ``recipe`` as JSON; ``named_recipe(path)`` reads it back."""
    file = Path(path)
    if file.suffix != ".json":
        raise ConfigError(f"recipes are written as .json, not {file.suffix or 'without a suffix'}")
    durable.write(file, (json.dumps(recipe.to_dict(), indent=2) + "\n").encode())
    return file
