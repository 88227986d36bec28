"""A graph run on all calibration batches at once, node by node, keeping only what is still read.

After node n, what is alive of each batch is the cut at n: values made up to n with a reader after
it. A layer can so be solved from what all batches bring to it, before anything behind it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.calibration.feed import Data, feed
from scaleprop.calibration.observer import Observer
from scaleprop.errors import CalibrationError, describe
from scaleprop.passes.base import Program

# argument's position → what a batch reads there in place of the argument's value
Replaced = Mapping[int, Callable[[Any], Any]]


class Walk:
    """All batches at one place of the graph. Each batch: the program's flat inputs."""

    def __init__(self, module: torch.fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = [_Batch(module, leaves) for leaves in batches]
        self._order = {node: index for index, node in enumerate(module.graph.nodes)}
        self._released = _last_reads(module.graph)

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    @torch.no_grad()
    def run(self, node: torch.fx.Node, replaced: Replaced | None = None) -> None:
        """Run ``node`` on every batch; drop what nothing reads any more."""
        released = self._released.get(node, ())
        for batch in self._batches:
            if node.op not in ("placeholder", "output"):
                batch.compute(node, replaced or {})
            for dead in released:
                batch.env.pop(dead, None)

    def value(self, batch: int, node: torch.fx.Node) -> torch.Tensor:
        """What ``node`` is in one batch.

        Raises:
            CalibrationError: NaN or Inf, naming node, source line and batch.
        """
        value = self._batches[batch].env[node]
        if not bool(value.isfinite().all()):
            raise CalibrationError(
                f"{describe(node)} is NaN or Inf in calibration batch {batch} (counted from 0). "
                "Remedy: drop that batch, or mask what the model does not use"
            )
        return value

    @torch.no_grad()
    def ahead(
        self, batch: int, nodes: Iterable[torch.fx.Node]
    ) -> dict[torch.fx.Node, torch.Tensor]:
        """What ``nodes``, here or ahead, are in one batch; what is ahead runs unchanged."""
        here = self._batches[batch]
        wanted = list(nodes)
        missing, pending = set[torch.fx.Node](), list(wanted)
        while pending:
            node = pending.pop()
            if node not in here.env and node not in missing:
                missing.add(node)
                pending.extend(node.all_input_nodes)
        for node in sorted(missing, key=self._order.__getitem__):
            here.compute(node, {})
        values = {node: here.env[node] for node in wanted}
        for node in missing:
            del here.env[node]
        return values


class _Batch(torch.fx.Interpreter):
    """One batch: the values that are alive."""

    def __init__(self, module: torch.fx.GraphModule, leaves: Sequence[Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.env = dict(zip(inputs, leaves, strict=True))

    def compute(self, node: torch.fx.Node, replaced: Replaced) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if replaced:
            args = tuple(replaced[index](value) if index in replaced else value
                         for index, value in enumerate(args))  # fmt: skip
        self.env[node] = getattr(self, node.op)(node.target, args, kwargs)


def _last_reads(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Node → the values that nothing reads after it. The model's outputs are not kept."""
    seen = set[torch.fx.Node]()
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            continue
        for value in (node, *node.all_input_nodes):
            if value not in seen:
                seen.add(value)
                found.setdefault(node, []).append(value)
    return found


def recorded(data: Data, program: Program) -> list[list[Any]]:
    """The flat inputs of every calibration batch, in any of the forms that ``feed`` takes.

    Raises:
        CalibrationError: as ``feed``.
    """
    recorder = _Recorder(program, runs=callable(data))
    feed(data, program, recorder)
    return recorder.batches


class _Recorder(Observer):
    """Keeps inputs. Runs the model only where somebody, a calibration function, reads outputs."""

    def __init__(self, program: Program, runs: bool) -> None:
        super().__init__(program.module, {})
        self.batches: list[list[Any]] = []
        self._runs = runs
        self._count = program.out_spec.num_leaves

    def observe(self, leaves: list[Any]) -> list[Any]:
        """Keep copies: a loader may use its memory again."""
        kept = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.batches.append(kept)
        if self._runs:
            return super().observe(leaves)
        self.batch += 1
        return [None] * self._count
