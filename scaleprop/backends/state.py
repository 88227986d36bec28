"""What a training run in low precision remembers from step to step: how many steps there were, and
the amax histories of operands that are not scaled by the data at hand.

Random numbers are functions of the seed, the step and the place, so these few numbers are all that
a resumed run needs to go on as if it had not stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scaleprop import _torch_compat as compat
from scaleprop.errors import ConfigError
from scaleprop.passes.training.memory import Row

MARGIN = 2.0**2  # how much larger than the first one a fixed amax is taken
_STEP = "step"


@dataclasses.dataclass
class _History:
    """Amax of the rows that are scaled alike; rows: their places in the graph's memory.

    values: float32 [rows, steps]; the largest of a row is used, 0 where none was seen.
    """

    kind: str
    rows: torch.Tensor
    values: torch.Tensor

    def to_use(self, step: int) -> torch.Tensor:
        """float32 [rows]; 0 for the amax of the data at hand."""
        if self.kind == "held" and step % self._steps == 0:
            return torch.zeros_like(self.values[:, 0])
        return self.values.amax(1)

    def keep(self, seen: torch.Tensor, step: int) -> None:
        """Take in the amax of the data of ``step``; NaN and Inf are not data."""
        seen = torch.where(seen.isfinite(), seen, 0.0)
        if self.kind == "delayed":
            self.values[:, step % self.values.shape[1]] = seen
        elif self.kind == "static":
            self.values[:, 0] = torch.where(self.values[:, 0] > 0, self.values[:, 0], seen * MARGIN)
        elif step % self._steps == 0:
            self.values[:, 0] = torch.where(seen > 0, seen, self.values[:, 0])

    _steps: int = 1


class GraphState:
    """Amax of one graph. rows: whose, in the graph's order; capacity: of its inputs."""

    def __init__(self, rows: Sequence[Row], capacity: int, device: torch.device) -> None:
        self.rows, self.capacity = tuple(rows), capacity
        self._step: int | None = None  # that ``seen`` is of
        self._used = torch.zeros(capacity, device=device)
        self._seen = torch.zeros(2, capacity, device=device)
        self._histories = [_history(scaling, list(found), device) for scaling, found in
                           itertools.groupby(sorted(enumerate(rows), key=_scaling), key=_scaling)]

    def begin(self, step: int, training: bool) -> tuple[torch.Tensor, ...]:
        """The inputs of the next run: step, amax to use, where to write amax forward, backward."""
        device = self._used.device
        if self._histories:
            if training and step != self._step:
                self._keep()
                self._step = step
            self._used = torch.zeros_like(self._used)  # earlier ones may wait for their backward
            for history in self._histories:
                self._used[history.rows] = history.to_use(step)
        return torch.tensor([step], device=device), self._used, self._seen[0], self._seen[1]

    def _keep(self) -> None:
        if self._step is None:
            return
        seen = self._seen.amax(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # one collective for all operands, as TransformerEngine has it
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        for history in self._histories:
            history.keep(seen[history.rows], self._step)
        self._seen.zero_()
        self._step = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Row → its history, that of the last step included."""
        self._keep()
        return {self.rows[row].name: history.values[place].clone() for history in self._histories
                for place, row in enumerate(history.rows.tolist())}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            ConfigError: where it is of other operands.
        """
        expected = {row.name for row in self.rows}
        if set(state) != expected:
            raise ConfigError(f"the training state is of other operands: {_differ(state, expected)}"
                              ". Remedy: the model and recipe that it was saved with")
        self._step = None
        self._seen.zero_()
        for history in self._histories:
            for place, row in enumerate(history.rows.tolist()):
                found = state[self.rows[row].name]
                if found.shape != history.values[place].shape:
                    raise ConfigError(f"{self.rows[row].name} has a history of {len(found)} steps, "
                                      f"not of {history.values.shape[1]}")
                history.values[place] = found


def _differ(state: Mapping[str, Any], expected: set[str]) -> str:
    missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
    return "; ".join(f"{what} {', '.join(names[:3])}{' …' * (len(names) > 3)}"
                     for what, names in (("without", missing), ("with", extra)) if names)


def _scaling(numbered: tuple[int, Row]) -> str:
    return numbered[1].scaling


def _history(
    scaling: str, found: Sequence[tuple[int, Row]], device: torch.device
) -> _History:
    kind, _, number = scaling.partition(":")
    steps = int(number) if number else 1
    rows = torch.tensor([row for row, _ in found], device=device)
    length = steps if kind == "delayed" else 1
    return _History(kind, rows, torch.zeros(len(found), length, device=device), steps)


class TrainingState:
    """Seed, steps and amax histories of a model's graphs.

    Graphs that were compiled again for other shapes share the state of their layers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._steps: dict[str, int] = {}  # of the last forward pass in training
        self._graphs: dict[str, GraphState] = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}

    def next_step(self, layer: str, training: bool) -> int:
        """Which step a run of the graph that begins with ``layer`` is of, from 0.

        A pass that is run again for the backward one, as activation checkpointing does, is of the
        same step; so is one without gradients.
        """
        step = self._steps.get(layer, -1)
        if training and not compat.in_backward():
            step += 1
            self._steps[layer] = step
        return max(step, 0)

    def of_graph(
        self, name: str, rows: Sequence[Row], capacity: int, device: torch.device
    ) -> GraphState:
        """The amax of the graph of this name."""
        found = self._graphs.get(name)
        if found is not None and found.rows == tuple(rows) and found.capacity == capacity:
            return found
        made = self._graphs[name] = GraphState(rows, capacity, device)
        if name in self._loaded:
            made.load_state_dict(self._loaded.pop(name))
        elif found is not None and found.rows == made.rows:
            made.load_state_dict(found.state_dict())
        return made

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by name: for ``torch.save`` or safetensors, beside the model's and the
        optimizer's."""
        found = {"seed": torch.tensor(self.seed)}
        found.update({f"{layer}|{_STEP}": torch.tensor(step)
                      for layer, step in self._steps.items()})
        for name, graph in self._graphs.items():
            found.update({f"{name}|{row}": value for row, value in graph.state_dict().items()})
        return found

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there; graphs that are not compiled yet do when they are.

        Raises:
            ConfigError: where it is no training state, or of other operands.
        """
        if "seed" not in state or int(state["seed"]) != self.seed:
            raise ConfigError(f"not the training state of a run with seed {self.seed}")
        by_graph: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            name, bar, rest = key.partition("|")
            if bar and rest == _STEP:
                self._steps[name] = int(value)
            elif bar:
                by_graph.setdefault(name, {})[rest] = value
        for name, found in by_graph.items():
            if name in self._graphs:
                self._graphs[name].load_state_dict(found)
            else:
                self._loaded[name] = found
