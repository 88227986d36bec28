"""Lightning: a ``Precision`` plugin.

    trainer = Trainer(plugins=[Precision("fp8")])

A ``LightningModule`` seldom calls itself: its steps call the modules in it, and log. So the modules
right below it are prepared, each as a whole: those with parameters and a ``forward``.

For ``pytorch_lightning``, and for its twin ``lightning.pytorch`` where that was imported first: the
two do not take each other's plugins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import nn

from scaleprop.adapters.base import Preparation, library
from scaleprop.backends.graphs import Inner
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import TrainingRecipe

if TYPE_CHECKING:
    from pytorch_lightning.plugins import Precision as Base
elif "lightning.pytorch" in sys.modules:
    Base = library("lightning", "lightning.pytorch.plugins").Precision
else:
    Base = library("pytorch_lightning", "pytorch_lightning.plugins").Precision


class Precision(Base):
    """Trains what a ``LightningModule`` consists of by ``recipe``.

    Args: as for ``scaleprop.prepare_training``; modules: see ``scaleprop.adapters``.

    Raises:
        ConfigError: on an unknown recipe or inner compiler; when the trainer sets up, where a
            pattern of ``modules`` is no module's name, or there is no module to prepare.
    """

    precision = "32-true"  # of parameters, inputs and outputs

    def __init__(self, recipe: str | TrainingRecipe = "fp8", *, inner: Inner = "inductor",
                 modules: Sequence[str] = ()) -> None:
        self._preparation = Preparation(recipe, inner, modules)
        self._done: WeakSet[nn.Module] = WeakSet()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Called by the strategy before it wraps the module; once more by a later evaluation."""
        if module not in self._done:
            whole = [module] if self._preparation.modules else list(_callable_parts(module))
            if not whole and next(module.parameters(), None) is not None:
                raise ConfigError(
                    f"{type(module).__name__} has parameters, but no module below it that is "
                    "called: nothing would train in low precision. Remedy: put its layers into a "
                    "module of their own.")
            for part in whole:
                self._preparation.apply(part)
            self._done.add(module)
        return module


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below ``module`` that are called, and have parameters."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable_parts(child)
        elif next(child.parameters(), None) is not None:
            yield child
