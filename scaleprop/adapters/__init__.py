"""Training libraries that run the loop themselves; each module is one library's own hook.

| loop           | what to use                                                                  |
|----------------|------------------------------------------------------------------------------|
| one's own      | ``scaleprop.prepare_training(model, recipe)`` before the first step           |
| Transformers   | ``Trainer(…, callbacks=[scaleprop.adapters.transformers.Callback(recipe)])``  |
| Lightning      | ``Trainer(…, plugins=[scaleprop.adapters.lightning.Precision(recipe)])``      |
| Accelerate     | ``scaleprop.adapters.accelerate.prepare(accelerator, model, …, recipe=…)``    |

All of them call ``prepare_training`` once the library has built the model: weights, ``state_dict``
keys, gradient accumulation, clipping, evaluation and checkpoints stay the library's. These
hold no ``training.training_state``: where a recipe is stochastic or carries amax, save it beside
them, or a resumed run goes on with other random numbers.

Each takes ``modules``: patterns of module names (``"blocks.*"``) that are compiled one by one, as
FSDP2 needs it, instead of the whole model. A ``*`` stands for one name between dots.

``pretrained`` is not about training: it quantizes what ``from_pretrained`` of transformers loads.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaleprop.adapters import accelerate, lightning, pretrained, transformers

__all__ = ["accelerate", "lightning", "pretrained", "transformers"]


def __getattr__(name: str) -> ModuleType:
    """Load an adapter, and its library, on first use.

    Raises:
        BackendUnavailable: where the library is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module 'scaleprop.adapters' has no attribute {name!r}")
    return importlib.import_module(f"scaleprop.adapters.{name}")
