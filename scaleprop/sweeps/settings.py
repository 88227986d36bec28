"""What all runs of a sweep share: the model, the data and how long and how fast to learn."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from scaleprop.errors import ConfigError
from scaleprop.training import prepare_training

Function = Callable[..., Any] | str
_FUNCTIONS = ("factory", "data", "validation", "loss", "optimizer")
_OPTIONS = tuple(name for name in inspect.signature(prepare_training).parameters
                 if name not in ("model", "recipe"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """See ``scaleprop.sweep`` for each; functions may be ``module:function``."""

    factory: Function
    data: Function
    validation: Function | None = None
    loss: Function | None = None
    optimizer: Function | None = None
    steps: int = 200
    learning_rate: float = 1e-3
    clip: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that makes no sense."""
        for name in _FUNCTIONS:
            given = getattr(self, name)
            if given is None and name in ("factory", "data"):
                raise ConfigError(f"a sweep needs {name}: a function, or 'module:function'")
            if given is not None and not isinstance(given, str) and not callable(given):
                raise ConfigError(f"{name}={given!r} is no function")
        if not isinstance(self.steps, int) or self.steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"steps={self.steps!r}: at least 1")
        if not _is_positive(self.learning_rate):
            raise ConfigError(f"learning_rate={self.learning_rate!r}: above 0")
        if self.clip is not None and not _is_positive(self.clip):
            raise ConfigError(f"clip={self.clip!r}: above 0, or None")
        if not isinstance(self.options, Mapping) or set(self.options) - set(_OPTIONS):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"options={self.options!r}: a table of what prepare_training takes; "
                              f"known: {', '.join(_OPTIONS)}")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a finished run to be the one that is wanted, as plain data.

        Raises:
            ConfigError: for a function that has no name to be found by again.
        """
        named = {name: name_of(given, name) if (given := getattr(self, name)) is not None else None
                 for name in _FUNCTIONS}
        rest = {"steps": self.steps, "learning_rate": self.learning_rate, "clip": self.clip,
                "options": dict(self.options)}
        try:
            return json.loads(json.dumps({**named, **rest}))
        except TypeError as error:
            raise ConfigError(f"options={self.options!r}: {error}; numbers, strings and the like "
                              "can be stored") from error

    def function(self, name: str) -> Callable[..., Any] | None:
        """A function, imported where it was given by name."""
        given = getattr(self, name)
        return resolve(given, name) if isinstance(given, str) else given

    def model(self, seed: int) -> torch.nn.Module:
        """A new model, its weights drawn by ``seed``.

        Raises:
            ConfigError: where the factory returns something else.
        """
        factory = self.function("factory")
        assert factory is not None  # checked when made
        torch.manual_seed(seed)
        made = factory()
        if not isinstance(made, torch.nn.Module):
            raise ConfigError(f"factory {name_of(self.factory, 'factory', strict=False)} returned "
                              f"{type(made).__name__}, not a torch.nn.Module")
        return made

    def batches(self, seed: int) -> Iterator[Any]:
        """As many batches as there are steps; the data start anew where they can.

        Raises:
            ConfigError: where there are fewer.
        """
        data = self.function("data")
        assert data is not None
        given = data(seed)
        if not isinstance(given, Iterable):
            raise ConfigError(f"data {name_of(self.data, 'data', strict=False)} returned "
                              f"{type(given).__name__}; it takes a seed and returns batches")
        yield from itertools.islice(_endless(given, self.steps), self.steps)

    def loss_of(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss of one batch.

        Raises:
            ConfigError: where it is not one number.
        """
        loss = self.function("loss")
        found = loss(model, batch) if loss is not None else _called(model, batch)
        found = getattr(found, "loss", found)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            what = (f"a tensor of {tuple(found.shape)}" if isinstance(found, torch.Tensor)
                    else type(found).__name__)
            raise ConfigError(f"the loss is {what}, not one number. Remedy: a model that returns "
                              "its loss, or loss=function(model, batch)")
        return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0 and math.isfinite(value)


def _called(model: torch.nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _endless(given: Iterable[Any], wanted: int) -> Iterator[Any]:
    count = 0
    while True:
        before = count
        for batch in given:
            count += 1
            yield batch
        if count == before:
            raise ConfigError(f"data ended after {count} of {wanted} batches. Remedy: fewer steps, "
                              "or an iterable that can start anew, such as a list")


def name_of(function: Any, what: str, *, strict: bool = True) -> str:
    """``module:function``; of a partial, with its arguments.

    Raises:
        ConfigError: for a lambda, a function inside another or an object's method, if ``strict``:
            two of the same name may be different ones.
    """
    if isinstance(function, str):
        return function
    if isinstance(function, functools.partial):
        parts = [name_of(function.func, what, strict=strict), *map(repr, function.args),
                 *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        if strict and (vague := [part for part in parts if " at 0x" in part]):
            raise ConfigError(f"{what}: argument {vague[0]} has no name to be stored. Remedy: "
                              "arguments that print as what they are")
        return f"{parts[0]}({', '.join(parts[1:])})"
    name = getattr(function, "__qualname__", "")
    owner = getattr(function, "__self__", None)
    of_object = owner is not None and not isinstance(owner, type | types.ModuleType)
    if strict and (not name or "<" in name or of_object):
        raise ConfigError(f"{what} {name or function!r} has no name by which its runs could be "
                          "found again. Remedy: a function of a module, functools.partial of one, "
                          "'module:function', or path=None to keep nothing")
    return f"{_module_of(function)}:{name or type(function).__name__}"


def _module_of(function: Any) -> str:
    """A script's own functions are called as they would be if it were imported: two scripts are two
    sweeps."""
    name = getattr(function, "__module__", None) or "?"
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return spec.name
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else name


def resolve(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules in this folder count.

    Raises:
        ConfigError: naming the part that does not exist.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{what}={spec!r}: expected module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what}={spec!r}: cannot import {module!r}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}={spec!r}: {module!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{what}={spec!r}: {type(found).__name__} is no function")
    return found
