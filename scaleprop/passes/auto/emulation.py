"""What a program would compute in its assigned formats, and what that costs each operator.

Weights and activations are rounded to their formats and multiplied in the model's own precision:
what scaled operators mean, without storing anything. A weight that was solved counts as solved.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, describe
from scaleprop.formats import fake_quantize, parse, quantize
from scaleprop.passes.assign import Assignment, assignment_of
from scaleprop.passes.base import Program
from scaleprop.passes.solving.solved import solved_of
from scaleprop.recipes.base import Role

Batches = Sequence[Sequence[Any]]  # flat inputs


@dataclasses.dataclass(frozen=True)
class Score:
    """What rounding costs. error: Σ‖y − ŷ‖² / Σ‖y‖² of the model's float outputs.

    local: operator's name → the same of its own output, given the inputs that it got.
    """

    error: float
    local: dict[str, float]


def outputs_of(program: Program, batches: Batches) -> list[list[Tensor]]:
    """The program's float outputs on each batch, nothing rounded."""
    run = torch.fx.Interpreter(program.module)
    with torch.no_grad():
        return [_floats(run.run(*leaves, enable_io_processing=False)) for leaves in batches]


def score(program: Program, batches: Batches, expected: Sequence[Sequence[Tensor]]) -> Score:
    """Run ``program`` as its formats would have it, and compare with ``expected``.

    Raises:
        CalibrationError: a static scale of a value that was not calibrated.
    """
    run = _Emulated(program)
    noise = signal = 0.0
    for leaves, wanted in zip(batches, expected, strict=True):
        with torch.no_grad():
            got = _floats(run.run(*leaves, enable_io_processing=False))
        noise += sum(_energy(a - b) for a, b in zip(got, wanted, strict=True))
        signal += sum(_energy(b) for b in wanted)
    local = {name: lost / kept if kept else lost for name, (lost, kept) in run.local.items()}
    return Score(noise / signal if signal else noise, local)


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _energy(x: Tensor) -> float:
    finite = torch.nan_to_num(x.double(), nan=0.0, posinf=0.0, neginf=0.0)
    return float(finite.square().sum())


class _Emulated(torch.fx.Interpreter):
    """Rounds what assigned operators read; keeps the error of each one's output."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.local: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._statistics = program.statistics
        self._weights: dict[torch.fx.Node, Tensor] = {}
        self._rounded: dict[Any, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value, from rounded operands where it has a format."""
        assignment = assignment_of(n)
        if assignment is None:
            return super().run_node(n)
        exact = super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args = list(args)
        for operand in assignment.contraction.operands:
            given: Any = args[operand.argument] if operand.argument < len(args) else None
            if operand.role == "weight" and assignment.weight is not None:
                args[operand.argument] = self._weight(n, given, assignment.weight)
            elif operand.role == "activation" and assignment.activation is not None:
                args[operand.argument] = self._activation(n, given, assignment)
        target: Any = n.target
        value = target(*args, **kwargs)
        sums = self.local[n.name]
        sums[0] += _energy(value - exact)
        sums[1] += _energy(exact)
        return value

    def _weight(self, node: torch.fx.Node, given: Tensor, role: Role) -> Tensor:
        if node not in self._weights:
            solved = solved_of(node)
            if solved is None:
                fmt = parse(role.format)
                searched = fmt.replace(rule="mse") if role.clipping == "mse" else fmt
                solved = quantize(given.reshape(given.shape[0], -1), searched)
            self._weights[node] = solved.dequantize().reshape(given.shape).to(given.dtype)
        return self._weights[node]

    def _activation(self, node: torch.fx.Node, given: Tensor, assignment: Assignment) -> Tensor:
        """Operators that read one value in one role share its rounding."""
        role = assignment.activation
        assert role is not None
        source: Any = assignment.argument(node, "activation")
        key = source, role, assignment.extremes
        kept = self._rounded.get(key)
        if kept is None or kept[0] is not given:
            scales = self._static(source, assignment) if role.scaling == "static" else None
            kept = given, fake_quantize(given, role.format, scales=scales)
            self._rounded[key] = kept
        return kept[1]

    def _static(self, source: torch.fx.Node, assignment: Assignment) -> list[Tensor]:
        seen = self._statistics.get(source.name)
        ends = assignment.extremes or (None if seen is None else (seen.min, seen.max))
        role = assignment.activation
        if ends is None or role is None:
            raise CalibrationError(f"{describe(source)} was not calibrated, and its scale is "
                                   "static. Remedy: run calibrate first")
        return quantize(torch.tensor(ends, dtype=torch.float32), role.format).parts[1:]
