"""Calibrate: run example inputs through the graph and keep what static scales and compensated
weights need.

Memory is constant in the number of batches: only statistics are kept, and activations die as soon
as the graph has read them. An interruption (Ctrl-C) leaves the given program as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.calibration.feed import feed, refuse_bare
from scaleprop.calibration.observer import Observer, Tally
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.assign import assignment_of
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.rules import contraction_of


@dataclasses.dataclass(frozen=True)
class Calibrate(Pass):
    """Collect statistics of activations from example inputs.

    data: an iterable of inputs (a tensor; a tuple of arguments; a dict of keyword arguments), or
        a function ``f(model)`` that calls the model that it is given.
    everything: also watch the activations of contractions that need no static scale.
    progress: show a bar on standard error (needs rich).
    moments: also keep second moments of what the weights of linear operators are multiplied with,
        [K, K] each; None: for those weights whose role has ``rounding="compensated"``.
    channels: keep extremes, means and moments of every channel, not its amax alone. Channels are
        counted along the axis that the value's readers sum over (``channel_axes``).
    sample: how many rows of each value to keep, drawn uniformly from all batches by ``seed``; 0:
        none. A row has one number per channel.
    watch: more values to watch: node name → the channels' axis, counted from the end.
    """

    data: Iterable[Any] | Callable[[Any], Any] | None = None
    everything: bool = False
    progress: bool = False
    moments: bool | None = None
    channels: bool = False
    sample: int = 0
    seed: int = 0
    watch: Mapping[str, int] | None = None

    name: ClassVar[str] = "calibrate"
    preserves_function: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The same graph, with ``statistics``."""
        if self.data is None:
            raise CalibrationError(
                "no calibration data. Remedy: pass an iterable of example inputs, or a function "
                "that calls the model"
            )
        refuse_bare(self.data)
        moments = moment_nodes(program, self.moments)
        also = self._also(program)
        axes = {**channel_axes(program), **also}
        watched = watched_nodes(program, self.everything) | moments | set(also)
        if not watched:
            note = "nothing to calibrate: no scale is static, no weight is compensated"
            return PassResult(program, False, (note,))
        total = _length(self.data)
        with progress_bar(self.progress, total) as update:
            tallies = {
                name: Tally(name in moments, axes.get(name, -1), channels=self.channels,
                            sample=self.sample, seed=self.seed)
                for name in sorted(watched)
            }
            observer = Observer(
                program.module, {name: tally.add for name, tally in tallies.items()}, update)
            feed(self.data, program, observer)
        found = {name: total for name, tally in tallies.items() if (total := tally.total)}
        statistics = {**program.statistics, **found}
        note = f"{len(found)} values over {observer.batch} batches"
        return PassResult(program.replace(statistics=statistics), True, (note,))

    def _also(self, program: Program) -> Mapping[str, int]:
        """``watch``, checked."""
        if self.sample < 0:
            raise ConfigError(f"pass {self.name!r}: sample={self.sample} is a number of rows")
        given: Any = self.watch or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"pass {self.name!r}: watch={given!r} is no mapping from names of "
                              "nodes to axes")
        values = {node.name: node.meta.get("val") for node in program.module.graph.nodes}
        for name, axis in given.items():
            if not isinstance(value := values.get(name), torch.Tensor):
                raise ConfigError(f"pass {self.name!r}: watch names {name!r}, which is no tensor "
                                  "of the graph. Remedy: use names of its nodes")
            if not -value.dim() <= axis < 0:
                raise ConfigError(f"pass {self.name!r}: axis {axis} of {name!r}, of shape "
                                  f"{list(value.shape)}, is none. Remedy: count from the end, -1 "
                                  "for the last")
        return dict(given)


def channel_axes(program: Program) -> dict[str, int]:
    """Activation name → the axis that contractions sum it over, counted from the end.

    The last for linears, the channels' for convolutions. Where readers of one value differ, linears
    and convolutions come before other products, then the first in the graph.
    """
    found: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for node in program.module.graph.nodes:
        contraction = contraction_of(node)
        for operand in contraction.operands if contraction is not None else ():
            source = node.args[operand.argument] if operand.argument < len(node.args) else None
            if operand.role == "activation" and operand.axes and isinstance(source, torch.fx.Node):
                assert contraction is not None
                found[contraction.kind in ("linear", "conv")].setdefault(
                    source.name, operand.axes[0])
    return {**found[False], **found[True]}


def watched_nodes(program: Program, everything: bool = False) -> set[str]:
    """Names of the values whose statistics are needed."""
    found: set[str] = set()
    for node in program.module.graph.nodes:
        assignment = assignment_of(node)
        needs = everything or (
            assignment is not None
            and assignment.activation is not None
            and assignment.activation.scaling == "static"
        )
        contraction = contraction_of(node)
        if not needs or contraction is None:
            continue
        for operand in contraction.operands:
            source = node.args[operand.argument] if operand.argument < len(node.args) else None
            if operand.role == "activation" and isinstance(source, torch.fx.Node):
                found.add(source.name)
    return found


def moment_nodes(program: Program, wanted: bool | None = None) -> set[str]:
    """Names of the values whose second moments compensated weights need.

    wanted: for all linear weights that get a format, or none; None: as their roles say.
    """
    found: set[str] = set()
    for node in program.module.graph.nodes:
        assignment = assignment_of(node)
        if assignment is None or assignment.contraction.kind != "linear":
            continue
        weight, source = assignment.weight, assignment.argument(node, "activation")
        compensates = weight is not None and weight.rounding == "compensated"
        needs = compensates if wanted is None else wanted and weight is not None
        if needs and isinstance(source, torch.fx.Node):
            found.add(source.name)
    return found


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None
