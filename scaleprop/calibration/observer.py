"""Run a graph on calibration batches and keep statistics of some of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.fx

from scaleprop.calibration.moments import SecondMoment
from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, describe

Call = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class Tally:
    """Statistics of one value over all batches so far.

    moment: its second moment too. axis: the channels', counted from the end. channels: more of
    each channel than its amax. sample: how many rows to keep; ``seed`` draws them, the same rows of
    every value that has as many.
    """

    def __init__(
        self, moment: bool = False, axis: int = -1, *, channels: bool = False, sample: int = 0,
        seed: int = 0,
    ) -> None:
        self._wants_moment = moment
        self._axis, self._channels, self._sample = axis, channels, sample
        self._generator = torch.Generator().manual_seed(seed) if sample else None
        self._seen: TensorStatistics | None = None
        self._moment: SecondMoment | None = None

    def add(self, value: torch.Tensor) -> None:
        """Count one batch."""
        seen = TensorStatistics.of(value, self._axis, channels=self._channels,
                                   sample=self._sample, generator=self._generator)
        self._seen = self._seen.merge(seen) if self._seen else seen
        if self._wants_moment:
            self._moment = self._moment or SecondMoment(value.shape[-1])
            self._moment.add(value)

    @property
    def total(self) -> TensorStatistics | None:
        """Statistics over all batches; None where there were none."""
        if self._seen is None or self._moment is None:
            return self._seen
        return dataclasses.replace(self._seen, second_moment=self._moment.total())


class Observer(torch.fx.Interpreter):
    """An interpreter that shows the values of ``watched`` nodes and keeps none of them.

    watched: node name → what is called with the node's tensor, batch for batch.
    calls: node name → what is called with the node's arguments, keyword arguments and value.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        watched: Mapping[str, Callable[[torch.Tensor], None]],
        on_batch: Callable[[int], None] = lambda _batch: None,
        calls: Mapping[str, Call] = MappingProxyType({}),
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.batch = 0
        self._watched = watched
        self._calls = calls
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

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value, after a look at it."""
        value = super().run_node(n)
        if n.name in self._watched and isinstance(value, torch.Tensor):
            self._refuse_not_finite(n, value)
            self._watched[n.name](value)
        if n.name in self._calls:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._calls[n.name](tuple(args), dict(kwargs), value)
        return value

    def _refuse_not_finite(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        if bool(value.isfinite().all()):
            return
        kinds = [name for name, found in (("NaN", value.isnan()), ("Inf", value.isinf()))
                 if bool(found.any())]  # fmt: skip
        raise CalibrationError(
            f"{describe(node)} is {' and '.join(kinds)} in calibration batch {self.batch} "
            "(counted from 0). Remedy: drop that batch, or mask what the model does not use"
        )
