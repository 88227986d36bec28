"""Hugging Face ``Trainer``: a callback.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[Callback("fp8")])

It prepares the model when training begins: on its device, wrapped for several processes, before
the first step and before an evaluation that comes first.
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
    from transformers import TrainerCallback
else:
    TrainerCallback = library("transformers", "transformers").TrainerCallback


class Callback(TrainerCallback):
    """Trains the model of a ``Trainer`` by ``recipe``.

    Args: as for ``scaleprop.prepare_training``; modules: see ``scaleprop.adapters``.

    Raises:
        ConfigError: on an unknown recipe or inner compiler; when training begins, where a pattern
            of ``modules`` is no module's name, or the trainer compiles the model itself.
    """

    def __init__(self, recipe: str | TrainingRecipe = "fp8", *, inner: Inner = "inductor",
                 modules: Sequence[str] = ()) -> None:
        self._preparation = Preparation(recipe, inner, modules)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        if args.torch_compile:
            raise ConfigError("torch_compile=True and scaleprop's callback each compile the model: "
                              "leave torch_compile out")
        assert model is not None
        self._preparation.apply(model)
