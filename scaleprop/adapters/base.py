"""What every adapter does, and how it says that its library is missing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from scaleprop.backends.dynamo import Options
from scaleprop.backends.graphs import Inner
from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.training import prepare_training


class Preparation:
    """How models are prepared: the arguments of every adapter, checked when it is made.

    Raises:
        ConfigError: on an unknown recipe or inner compiler, or patterns that are no list of names.
    """

    def __init__(self, recipe: str | TrainingRecipe, inner: Inner, modules: Sequence[str]) -> None:
        Options(recipe=recipe, inner=inner)
        if isinstance(modules, str):
            raise ConfigError(f"modules={modules!r} is one string: give a list of patterns, "
                              f"[{modules!r}]")
        given: Any = modules
        if not isinstance(given, list | tuple) or any(type(one) is not str for one in modules):
            raise ConfigError(f"modules={given!r}: give a list of patterns of module names")
        self.recipe: str | TrainingRecipe = recipe
        self.inner: Inner = inner
        self.modules = tuple(modules)

    def apply(self, model: nn.Module) -> list[nn.Module]:
        """Prepare ``model``, or those modules of it that are named; which they are.

        Raises:
            ConfigError: where a pattern is no module's name.
        """
        chosen = self._named(model) if self.modules else [model]
        for module in chosen:
            prepare_training(module, self.recipe, inner=self.inner)
        return chosen

    def _named(self, model: nn.Module) -> list[nn.Module]:
        named = dict(model.named_modules())
        chosen: dict[str, nn.Module] = {}
        for pattern in self.modules:
            matches = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
            found = {name: module for name, module in named.items() if matches.fullmatch(name)}
            if not found:
                names = ", ".join(list(filter(None, named))[:8])
                raise ConfigError(f"no module of {type(model).__name__} is called {pattern!r}; "
                                  f"there are {names}, …")
            chosen |= found
        return list(chosen.values())


def library(package: str, needed: str) -> ModuleType:
    """An optional package's module ``needed``.

    Raises:
        BackendUnavailable: naming what installs it.
    """
    try:
        return importlib.import_module(needed)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise BackendUnavailable(
            f"this adapter needs {package}: {install_command(package)}") from error
