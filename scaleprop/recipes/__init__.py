"""Recipes: which tensor gets which format. Frozen values with names, files and ``replace``."""

from scaleprop.recipes.base import SCHEMA_VERSION, Recipe, Role
from scaleprop.recipes.files import load_recipe, named_recipe, named_recipes, save_recipe

__all__ = [
    "SCHEMA_VERSION",
    "Recipe",
    "Role",
    "load_recipe",
    "named_recipe",
    "named_recipes",
    "save_recipe",
]
