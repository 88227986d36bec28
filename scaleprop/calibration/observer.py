"""Run a graph on calibration batches and keep statistics of some of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx

from scaleprop.calibration.moments import SecondMoment
from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, describe


class Observer(torch.fx.Interpreter):
    """An interpreter that looks at the values of ``watched`` nodes and keeps none of them.

    statistics: node name → statistics over all batches so far.
    moments: which of the watched values get a second moment too; ``summary`` has them.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        watched: Collection[str],
        on_batch: Callable[[int], None] = lambda _batch: None,
        moments: Collection[str] = (),
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.statistics: dict[str, TensorStatistics] = {}
        self.batch = 0
        self._watched = frozenset(watched)
        self._wants_moment = frozenset(moments)
        self._moments: dict[str, SecondMoment] = {}
        self._on_batch = on_batch

    def observe(self, leaves: list[Any]) -> list[Any]:
        """Run one batch, given as flat inputs; returns the flat outputs.

        Raises:
            CalibrationError: NaN or Inf in a watched value, naming node, source line and batch.
        """
        with torch.no_grad():
            outputs = self.run(*leaves, enable_io_processing=False)
        self.batch += 1
        self._on_batch(self.batch)
        return list(outputs)

    def summary(self) -> dict[str, TensorStatistics]:
        """Node name → statistics over all batches, with second moments where asked for."""
        return {
            name: dataclasses.replace(seen, second_moment=self._moments[name].total())
            if name in self._moments
            else seen
            for name, seen in self.statistics.items()
        }

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value, after a look at it."""
        value = super().run_node(n)
        if n.name in self._watched and isinstance(value, torch.Tensor):
            self._look(n, value)
        return value

    def _look(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        if not bool(value.isfinite().all()):
            kinds = [name for name, found in (("NaN", value.isnan()), ("Inf", value.isinf()))
                     if bool(found.any())]  # fmt: skip
            raise CalibrationError(
                f"{describe(node)} is {' and '.join(kinds)} in calibration batch {self.batch} "
                "(counted from 0). Remedy: drop that batch, or mask what the model does not use"
            )
        seen = TensorStatistics.of(value)
        earlier = self.statistics.get(node.name)
        self.statistics[node.name] = earlier.merge(seen) if earlier else seen
        if node.name in self._wants_moment:
            moment = self._moments.setdefault(node.name, SecondMoment(value.shape[-1]))
            moment.add(value)
