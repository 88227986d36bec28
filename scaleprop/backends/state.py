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
_WAITING = 4  # how many steps later a backward pass may come for its amax to count


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
    """Amax of the operands of a graph, and of others that it is compiled to beside it: without
    gradients, for other shapes. rows: whose."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = tuple(rows), device
        # what the graphs of the last steps write their amax to: step, [2, capacity], whose it is
        self._written: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._histories = [_history(scaling, list(found), device) for scaling, found in
                           itertools.groupby(sorted(enumerate(rows), key=_scaling), key=_scaling)]

    def places(self, rows: Sequence[Row]) -> torch.Tensor:
        """Where ``rows`` are among all; what is not yet there is added."""
        if added := [row for row in rows if row not in self.rows]:
            before = self.histories()
            self.__dict__.update(GraphState((*self.rows, *added), self.device).__dict__ | {
                "_written": self._written})
            for row, values in self._by_row().items():
                values.copy_(before.get(row, values))
        return torch.tensor([self.rows.index(row) for row in rows], dtype=torch.int64,
                            device=self.device)

    def begin(
        self, step: int, training: bool, places: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, ...]:
        """The inputs of a run of a graph with the rows at ``places``: step, amax to use, where to
        write amax forward, backward. The last three are the run's own: others may come between its
        forward and its backward pass."""
        used, seen = (torch.zeros(size, device=self.device) for size in (capacity, (2, capacity)))
        if len(places):
            if training and all(step != of for of, *_ in self._written[-1:]):
                self.keep(step)
            whole = torch.zeros(len(self.rows), device=self.device)
            for history in self._histories:
                whole[history.rows] = history.to_use(step)
            used[:len(places)] = whole[places]
            if training:
                self._written.append((step, seen, places))
        return torch.tensor([step], device=self.device), used, seen[0], seen[1]

    def keep(self, step: int) -> None:
        """Take in what the steps before ``step`` saw: again what has waited for its backward."""
        found = [seen.detach().amax(0)[:len(places)] for _, seen, places in self._written]
        if not found:
            return
        whole = torch.cat(found)
        whole = torch.where(whole.isfinite(), whole, 0.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # one collective for all operands, as TransformerEngine has it
            torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MAX)
        by_step: dict[int, torch.Tensor] = {}
        parts = whole.split([len(part) for part in found])
        for (of, _, places), part in zip(self._written, parts, strict=True):
            seen = by_step.setdefault(of, torch.zeros(len(self.rows), device=self.device))
            seen[places] = seen[places].maximum(part)
        for of, seen in by_step.items():
            for history in self._histories:
                history.keep(seen[history.rows], of)
        self._written = [each for each in self._written if each[0] > step - _WAITING]

    def _by_row(self) -> dict[Row, torch.Tensor]:
        return {self.rows[row]: history.values[place] for history in self._histories
                for place, row in enumerate(history.rows.tolist())}

    def histories(self) -> dict[Row, torch.Tensor]:
        """Copies."""
        return {row: values.clone() for row, values in self._by_row().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Row → its history, that of the last step included."""
        if self._written:
            self.keep(self._written[-1][0])
        return {row.name: values for row, values in self.histories().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            ConfigError: where it has none of an operand, or a history of another length.
        """
        if missing := sorted({row.name for row in self.rows} - set(state)):
            raise ConfigError("the training state is of other operands: without "
                              f"{', '.join(missing[:3])}{' …' * (len(missing) > 3)}. Remedy: the "
                              "model and recipe that it was saved with")
        for row, values in self._by_row().items():
            found = state[row.name]
            if found.shape != values.shape:
                raise ConfigError(f"{row.name} has a history of {len(found)} steps, not of "
                                  f"{len(values)}. Remedy: the recipe that it was saved with")
        self._written = []
        for row, values in self._by_row().items():
            values.copy_(state[row.name])


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
        self._forward: set[str] = set()  # layers that were trained outside a backward pass
        self._graphs: dict[str, GraphState] = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}

    def next_step(self, layer: str, training: bool) -> int:
        """Which step a run of the graph that begins with ``layer`` is of, from 0.

        A pass that is run again for the backward one, as activation checkpointing does, is of the
        same step. One without gradients is of the step to come: reentrant checkpointing runs its
        forward pass so, and the step is counted when that is run again.
        """
        step = self._steps.get(layer, -1)
        again = compat.in_backward()
        if not training or (again and layer in self._forward):
            return max(step, 0) if again else step + 1
        if not again:
            self._forward.add(layer)
        self._steps[layer] = step + 1
        return step + 1

    def of_graph(self, name: str, rows: Sequence[Row], device: torch.device) -> GraphState:
        """The amax of the graph of this name; where its operands are scaled in other ways than
        before, as by another recipe, they begin anew.

        Raises:
            ConfigError: where a state that was loaded is of other operands.
        """
        found = self._graphs.get(name)
        ways = {row.name: row.scaling for row in found.rows} if found is not None else {}
        if found is None or any(ways.get(row.name, row.scaling) != row.scaling for row in rows):
            found = self._graphs[name] = GraphState((), device)
        found.places(rows)
        if name in self._loaded:
            self._load(name)
        return found

    def _load(self, name: str) -> None:
        """Have the graph go on from what was loaded for it; what its operands are not yet compiled
        for stays loaded."""
        graph, loaded = self._graphs[name], self._loaded[name]
        graph.load_state_dict(loaded)
        if set(loaded) == {row.name for row in graph.rows}:
            del self._loaded[name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by name: for ``torch.save`` or safetensors, beside the model's and the
        optimizer's.

        Where amax is carried and training is distributed, ranks agree on it first: to be called on
        all of them, as FSDP's is, even if one alone saves it.
        """
        found = {"seed": torch.tensor(self.seed)}
        found.update({f"{layer}|{_STEP}": torch.tensor(step)
                      for layer, step in self._steps.items()})
        for name, loaded in self._loaded.items():
            found.update({f"{name}|{row}": value for row, value in loaded.items()})
        for name, graph in self._graphs.items():
            found.update({f"{name}|{row}": value for row, value in graph.state_dict().items()})
        return found

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there; graphs that are not compiled yet do when they are.

        Raises:
            ConfigError: where it is no training state, of another seed, or of other operands.
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
        self._loaded = by_graph
        for name in [name for name in by_graph if name in self._graphs]:
            self._load(name)
