"""Accelerate: ``Accelerator.prepare``, with the models prepared for training in low precision.

    model, optimizer, loader = prepare(accelerator, model, optimizer, loader, recipe="fp8")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from scaleprop.adapters.base import Preparation, library
from scaleprop.backends.graphs import Inner
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import TrainingRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator
else:
    Accelerator = library("accelerate", "accelerate").Accelerator


def prepare(
    accelerator: Accelerator, *objects: Any, recipe: str | TrainingRecipe = "fp8",
    inner: Inner = "inductor", modules: Sequence[str] = (),
) -> Any:
    """What ``accelerator.prepare(*objects)`` returns; each model among them trains by ``recipe``.

    Args: as for ``scaleprop.prepare_training``; modules: see ``scaleprop.adapters``.

    Raises:
        ConfigError: on an unknown recipe or inner compiler, where a pattern of ``modules`` is no
            module's name, no model is among the objects, or the accelerator compiles models or
            casts them to FP8 itself.
    """
    preparation = Preparation(recipe, inner, modules)
    known: Any = accelerator
    if not isinstance(known, Accelerator):
        raise ConfigError("prepare takes an accelerate.Accelerator first, "
                          f"not {type(known).__name__}")
    if not any(isinstance(given, nn.Module) for given in objects):
        raise ConfigError("no model among the objects to prepare: pass it with its optimizer")
    _check(accelerator)
    prepared: Any = accelerator.prepare(*objects)
    for found in prepared if isinstance(prepared, tuple) else (prepared,):
        if isinstance(found, nn.Module):
            preparation.apply(accelerator.unwrap_model(found))
    return prepared


def _check(accelerator: Any) -> None:
    """Raise ``ConfigError`` for what would do the same work twice."""
    if accelerator.mixed_precision == "fp8":
        raise ConfigError("mixed_precision='fp8' casts to FP8, and so does this: use "
                          "mixed_precision='no' or 'bf16'")
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend.value not in (None, "NO"):
        raise ConfigError(f"the accelerator compiles models itself (dynamo_backend="
                          f"{plugin.backend.value!r}): leave dynamo_backend out")
