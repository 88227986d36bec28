"""What the command line's arguments name: models, calibration data, and the user's own code."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaleprop.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the inputs to capture it with."""

    model: torch.nn.Module | ExportedProgram
    inputs: Any


def load_subject(spec: str, inputs: str | None) -> Subject:
    """The model that ``spec`` names.

    Args:
        spec: ``package.module:factory``, where the factory returns a module or
            ``(module, example_inputs)``; the path of a ``.pt2`` file that ``torch.export.save``
            wrote, which has its example inputs with it; or a folder that ``save_pretrained``
            wrote, whose model's own dummy inputs serve as example.
        inputs: ``package.module:function`` returning example inputs; overrides the factory's.

    Raises:
        ConfigError: naming what is missing or of the wrong type.
    """
    if is_checkpoint(spec):
        subject = _load_folder(Path(spec))
    else:
        subject = _load_exported(Path(spec)) if spec.endswith(".pt2") else _call_factory(spec)
    if inputs is not None:
        return dataclasses.replace(subject, inputs=call(inputs, "inputs"))
    if subject.inputs is None:
        raise ConfigError(
            f"{spec!r} has no example inputs: return (model, example_inputs) from the factory, "
            "or pass --inputs package.module:function"
        )
    return subject


def is_checkpoint(spec: str) -> bool:
    """Whether this is a folder of ``save_pretrained``."""
    return (Path(spec) / "config.json").is_file()


def _load_folder(directory: Path) -> Subject:
    from scaleprop.interchange.reading import read_model

    model: Any = read_model(directory)
    return Subject(model, getattr(model, "dummy_inputs", None))


def _load_exported(path: Path) -> Subject:
    import torch

    if not path.is_file():
        raise ConfigError(f"no such file: {str(path)!r}")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ConfigError(
            f"{str(path)!r} is not an exported program: {type(error).__name__}: {error}; "
            "write one with torch.export.save"
        ) from error
    return Subject(program, program.example_inputs)


def _call_factory(spec: str) -> Subject:
    import torch

    made = call(spec, "model")
    if isinstance(made, torch.nn.Module):
        return Subject(made, None)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):  # pyright: ignore[reportUnknownArgumentType]
        return Subject(made[0], made[1])
    raise ConfigError(
        f"{spec!r} returned {type(made).__name__}; expected a torch.nn.Module or "
        "(module, example_inputs)"
    )


def call(spec: str, what: str) -> Any:
    """What ``package.module:function`` returns.

    Raises:
        ConfigError: where it does not exist, or raises.
    """
    function = resolve(spec, what)
    try:
        return function()
    except Exception as error:
        raise ConfigError(f"{what} {spec!r} raised {type(error).__name__}: {error}") from error


def resolve(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; modules in this folder count.

    Raises:
        ConfigError: naming the part that does not exist.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(
            f"{what} {spec!r}: expected package.module:function"
            + (", a .pt2 file or a folder with config.json" if what == "model" else "")
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{what} {spec!r}: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what} {spec!r}: {module_name!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{what} {spec!r}: {name!r} is {type(found).__name__}, not a function")
    return found
