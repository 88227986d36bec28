"""Training in low precision without touching the model's code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from scaleprop import _torch_compat as compat
from scaleprop.backends.dynamo import Inner, Options, Recipe, compile_with
from scaleprop.errors import ConfigError
from scaleprop.passes.training import Lowered

_REPORTS: WeakKeyDictionary[torch.nn.Module, list[Lowered]] = WeakKeyDictionary()


def prepare_training(
    model: torch.nn.Module, recipe: Recipe = "fp8", *, inner: Inner = "inductor"
) -> torch.nn.Module:
    """Let ``model`` run forward and backward by ``recipe``, from its next call on.

    The model itself is returned: its parameters, ``state_dict`` keys, hooks and optimizers stay
    what they were, as after ``nn.Module.compile``. Call it again to change the recipe.

    Args:
        recipe: ``fp8`` runs linear layers on E4M3 data and gradients in E5M2; ``fp32`` changes
            nothing.
        inner: what runs the rewritten graphs: ``inductor``, or ``eager``, to debug.

    Raises:
        ConfigError: on an unknown recipe or inner compiler.
    """
    options = Options(recipe=recipe, inner=inner)
    reports = _REPORTS[model] = []
    backend = functools.partial(_compile, options=options, reports=reports)
    compat.compile_in_place(model, backend)
    return model


def _compile(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, options: Options, reports: list[Lowered]
) -> Any:
    return compile_with(module, inputs, options, reports.append)


def scale_report(model: torch.nn.Module) -> tuple[Lowered, ...]:
    """What was done to each graph of a prepared model so far: products, casts and their exponents.

    Raises:
        ConfigError: where ``model`` was not given to ``prepare_training``.
    """
    if model not in _REPORTS:
        raise ConfigError(f"{type(model).__name__} was not given to scaleprop.prepare_training")
    return tuple(_REPORTS[model])
