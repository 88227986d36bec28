"""Where the values of a joint graph lie, measured on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat

# graph, its real inputs, values → the largest magnitude of those where it is known
Sizes = Callable[
    [torch.fx.GraphModule, Sequence[Any], Collection[torch.fx.Node]], Mapping[torch.fx.Node, float]]


def measured_amax(
    module: torch.fx.GraphModule, inputs: Sequence[Any], chosen: Collection[torch.fx.Node]
) -> Mapping[torch.fx.Node, float]:
    """The largest magnitude of the ``chosen`` values when the graph runs on real ``inputs``.

    Sizes among them that are symbols are what they were in the traced batch: no guard is added.
    """
    sizes = [compat.traced_size(x) if isinstance(x, torch.SymInt) else x for x in inputs]
    with torch.no_grad(), compat.without_modes(), torch.random.fork_rng():
        run = _Watch(module, chosen)
        run.run(*sizes, enable_io_processing=False)
    return run.amax


class _Watch(torch.fx.Interpreter):
    def __init__(
        self, module: torch.fx.GraphModule, chosen: Collection[torch.fx.Node]
    ) -> None:
        super().__init__(module)
        self._chosen = frozenset(chosen)
        self.amax: dict[torch.fx.Node, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._chosen:
            self.amax[n] = float(value.abs().max()) if value.numel() else 0.0
        return value


def exponent_for(amax: float, largest: float, margin: int) -> int:
    """The least e with amax·2^-e ≤ largest·2^-margin; 0 where amax is zero or not finite."""
    if not 0.0 < amax < math.inf:
        return 0
    fraction, exponent = math.frexp(amax / largest)
    return (exponent - 1 if fraction == 0.5 else exponent) + margin
