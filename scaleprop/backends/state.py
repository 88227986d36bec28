"""What a training run in low precision remembers from step to step: how many steps there were, and
the amax histories of operands that are not scaled by the data at hand.

Random numbers are functions of the seed, the step and the place, so these few numbers are all that
a resumed run needs to go on as if it had not stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from scaleprop import _torch_compat as compat
from scaleprop.errors import ConfigError
from scaleprop.passes.training.memory import Row

MARGIN = 2.0**2  # how much larger than the first one a fixed amax is taken
_STEP = "step"
_STEPS = 32  # bits; with 28 more for a place they are those that random numbers count steps in
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
        """Take in the amax of the data of ``step``; 0 where there was none."""
        if self.kind == "delayed":
            self.values[:, step % self.values.shape[1]] = seen
        elif self.kind == "static":
            self.values[:, 0] = torch.where(self.values[:, 0] > 0, self.values[:, 0], seen * MARGIN)
        elif step % self._steps == 0:
            self.values[:, 0] = torch.where(seen > 0, seen, self.values[:, 0])

    _steps: int = 1


class GraphState:
    """Amax of the operands of a graph, and of others that it is compiled to beside it: without
    gradients, for other shapes."""

    def __init__(self, device: torch.device) -> None:
        self.rows: tuple[Row, ...] = ()
        self.device = device
        # what the graphs of the last steps write their amax to: step, [2, capacity], whose it is
        self._written: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._histories: list[_History] = []
        self._places: dict[tuple[Row, ...], torch.Tensor] = {}

    def add(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Begin a history for each of ``rows`` that has none; these."""
        added = tuple(row for row in dict.fromkeys(rows) if row not in self.rows)
        if added:
            before = self._by_row()
            self.rows += added
            self._histories = [
                _history(scaling, list(found), self.device) for scaling, found in
                itertools.groupby(sorted(enumerate(self.rows), key=_scaling), key=_scaling)]
            for row, values in self._by_row().items():
                values.copy_(before.get(row, values))
        return added

    def like(self) -> GraphState:
        """One of the same operands that saw nothing."""
        made = GraphState(self.device)
        made.add(self.rows)
        return made

    def _place(self, rows: tuple[Row, ...]) -> torch.Tensor:
        if rows not in self._places:
            self._places[rows] = torch.tensor([self.rows.index(row) for row in rows],
                                              dtype=torch.int64, device=self.device)
        return self._places[rows]

    def begin(
        self, step: int, training: bool, rows: Sequence[Row], capacity: int, place: str = ""
    ) -> tuple[torch.Tensor, ...]:
        """The inputs of a run of a graph with these rows: step, amax to use, where to
        write amax forward, backward. The last three are the run's own: others may come between its
        forward and its backward pass. place: which of the blocks that share the graph it is; its
        random numbers are those of steps that no run reaches."""
        used, seen = (torch.zeros(size, device=self.device) for size in (capacity, (2, capacity)))
        if rows:
            places = self._place(tuple(rows))
            histories = self._histories
            if self._written and self._written[-1][0] != step:
                # others may not evaluate: no collective, and nothing is kept
                histories = self.keep(step) if training else self._alone()
            whole = torch.zeros(len(self.rows), device=self.device)
            for history in histories:
                whole[history.rows] = history.to_use(step)
            used[:len(rows)] = whole[places]
            if training:
                self._written.append((step, seen, places))
        counted = step | (zlib.crc32(place.encode()) >> 4 << _STEPS if place else 0)
        return torch.tensor([counted], device=self.device), used, seen[0], seen[1]

    def keep(self, step: int) -> list[_History]:
        """Take in what the steps before ``step`` saw, on any rank: again what has waited for its
        backward pass."""
        found = self._seen()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # one collective for all operands, as TransformerEngine has it
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        self._take(found, self._histories)
        self._written = [each for each in self._written if each[0] > step - _WAITING]
        return self._histories

    def _alone(self) -> list[_History]:
        """What ``keep`` would make of what this rank saw."""
        histories = copy.deepcopy(self._histories)
        self._take(self._seen(), histories)
        return histories

    def _seen(self) -> torch.Tensor:
        """All that was written and not yet let go, one run after another; NaN and Inf are no
        data."""
        whole = torch.cat([seen.detach().amax(0)[:len(places)]
                           for _, seen, places in self._written])
        return torch.where(whole.isfinite(), whole, 0.0)

    def _take(self, found: torch.Tensor, histories: Sequence[_History]) -> None:
        by_step: dict[int, torch.Tensor] = {}
        parts = found.split([len(places) for *_, places in self._written])
        for (step, _, places), part in zip(self._written, parts, strict=True):
            seen = by_step.setdefault(step, torch.zeros(len(self.rows), device=self.device))
            seen.scatter_reduce_(0, places, part, "amax")
        for step, seen in by_step.items():
            for history in histories:
                history.keep(seen[history.rows], step)

    def _by_row(self) -> dict[Row, torch.Tensor]:
        return {self.rows[row]: history.values[place] for history in self._histories
                for place, row in enumerate(history.rows.tolist())}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Row → its history, that of the last step included."""
        if self._written:
            self.keep(self._written[-1][0])
        return {row.name: values.clone() for row, values in self._by_row().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], rows: Sequence[Row]) -> None:
        """Have these ``rows`` go on from what ``state_dict`` gave.

        Raises:
            ConfigError: where it has none of an operand, or a history of another length.
        """
        if missing := sorted({row.name for row in rows} - set(state)):
            raise ConfigError("the training state is of other operands: without "
                              f"{', '.join(missing[:3])}{' …' * (len(missing) > 3)}. Remedy: the "
                              "model and recipe that it was saved with")
        mine = self._by_row()
        for row in rows:
            if state[row.name].shape != mine[row].shape:
                raise ConfigError(f"{row.name} has a history of {len(state[row.name])} steps, not "
                                  f"of {len(mine[row])}. Remedy: the recipe that it was saved with")
        self._written = []
        for row in rows:
            mine[row].copy_(state[row.name])


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

    def __init__(self, seed: int = 0, model: torch.nn.Module | None = None) -> None:
        self.seed = seed
        self._model = None if model is None else weakref.ref(model)
        self._names: Any = WeakIdKeyDictionary()  # parameter → what the model calls it
        self._steps: dict[str, int] = {}  # of the last forward pass in training
        self._forward: set[str] = set()  # layers that were trained outside a backward pass
        self._graphs: dict[str, GraphState] = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}

    def of_run(self, inputs: Sequence[Any]) -> TrainingState:
        """The state that a run of a graph with these inputs is of."""
        return self

    def place_of(self, parameter: Any, name: str) -> str:
        """What comes before ``name``, as a graph calls ``parameter``, in the model.

        Where Dynamo cannot take a whole forward function, it compiles what that calls, once for all
        blocks of a class: the graph says ``up.weight`` for ``blocks.3.up.weight``. "" where names
        are the model's, or the parameter is not: FSDP makes others.
        """
        model = self._model() if self._model is not None else None
        if model is None:
            return ""
        if parameter not in self._names:
            self._names[parameter] = ()
            for known, each in model.named_parameters(remove_duplicate=False):
                self._names[each] = tuple(dict.fromkeys((*self._names.get(each, ()), known)))
        names = self._names[parameter]
        if name in names:
            return ""
        return next((known.removesuffix(name) for known in names if known.endswith(f".{name}")), "")

    def next_step(self, layer: str, training: bool) -> int:
        """Which step a run of the graph that begins with ``layer`` is of, from 0.

        A pass that is run again for the backward one, as activation checkpointing does, is of the
        same step. One without gradients is of the step to come: reentrant checkpointing runs its
        forward pass so, and the step is counted when that is run again. What runs again is of the
        latest step: of two that wait for their backward passes, one is recomputed with other random
        numbers than it had.
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
            found = self._graphs[name] = GraphState(device)
        if (added := found.add(rows)) and name in self._loaded:
            self._load(name, added)
        return found

    def _load(self, name: str, rows: Sequence[Row]) -> None:
        """Have rows of a graph go on from what was loaded for it; the others, which it may yet be
        compiled for, stay loaded."""
        self._graphs[name].load_state_dict(self._loaded[name], rows)
        for row in rows:
            self._loaded[name].pop(row.name, None)
        if not self._loaded[name]:
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
        steps: dict[str, int] = {}
        by_graph: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            name, bar, rest = key.partition("|")
            if bar and rest == _STEP:
                steps[name] = int(value)
            elif bar:
                by_graph.setdefault(name, {})[rest] = value
        for name in set(by_graph) & set(self._graphs):  # before anything is changed
            self._graphs[name].like().load_state_dict(by_graph[name], self._graphs[name].rows)
        self._steps, self._loaded = steps, by_graph
        self._graphs = {name: graph.like() for name, graph in self._graphs.items()}
        for name in [name for name in by_graph if name in self._graphs]:
            self._load(name, self._graphs[name].rows)
