"""Quantize activations: what a scaled operator reads is brought to its format right before it.

    scaled_mm([x], w, …)  →  scaled_mm(quantize(x, format), w, …)
    conv(x, ŵ, b)         →  conv(fake_quantize(x, format), ŵ, b)

Dynamic scales are found at run time, by the format's own rule, per tensor, token or block. Static
ones come from calibration, or are given, and become buffers; of formats with two levels the scale
of the whole tensor is static, those of blocks follow the data. Operators that read the same value
in the same format share one quantization.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, PreconditionError, describe, source_line
from scaleprop.formats import parse, quantize
from scaleprop.passes.assign import Assignment, assignment_of
from scaleprop.passes.base import PROVENANCE, Pass, PassResult, Program, Provenance
from scaleprop.passes.operators import FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.provenance import innermost_module, statistic_of
from scaleprop.passes.rewrite import Rewriter, shape_of
from scaleprop.recipes.base import Role
from scaleprop.report.records import ScaleProvenance, TensorRecord


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Insert the quantization of every assigned activation."""

    name: ClassVar[str] = "quantize-activations"
    one_by_one: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        """Weights come first: they make the operators that take quantized activations."""
        for node in program.module.graph.nodes:
            assignment = assignment_of(node)
            is_linear = assignment is not None and assignment.contraction.kind == "linear"
            if is_linear and node.target is not SCALED_MM:
                raise PreconditionError(
                    f"{describe(node)} is not a scaled operator yet; run quantize-weights first"
                )

    def run(self, program: Program) -> PassResult:
        """The program with quantized activations, and a record for each operand."""
        work = _Activations(Rewriter(program, self.name), self.name)
        for node in list(work.rewriter.graph.nodes):
            assignment = assignment_of(node)
            if assignment is not None and assignment.activation is not None:
                work.rewrite(node, assignment, assignment.activation)
        result = work.rewriter.finish()
        result = result.replace(records=(*result.records, *work.records))
        note = f"{len(work.records)} operands read {work.made} quantized activations"
        return PassResult(result, work.rewriter.modified, (note,))


class _Activations:
    """The pass at work: the graph, what is quantized already, and the records so far."""

    def __init__(self, rewriter: Rewriter, by: str) -> None:
        self.rewriter = rewriter
        self.by = by
        self.records: list[TensorRecord] = []
        self._quantized: dict[Any, torch.fx.Node] = {}
        self._scales: dict[Any, list[torch.fx.Node]] = {}

    @property
    def made(self) -> int:
        """How many quantizations were inserted."""
        return len(self._quantized)

    def rewrite(self, node: torch.fx.Node, assignment: Assignment, role: Role) -> None:
        is_mm = node.target is SCALED_MM
        operands: Any = node.args[0]
        x: torch.fx.Node = operands[0] if is_mm else assignment.argument(node, "activation")
        name = str(parse(role.format))
        operator = QUANTIZE if is_mm else FAKE_QUANTIZE
        is_static = role.scaling == "static"
        extremes = assignment.extremes if is_static else None
        given = assignment.scales if is_static else None
        key = (x, operator, name, role.rounding, role.scaling, extremes, given)
        if key not in self._quantized:
            scales = self._static_scales(node, x, role, extremes, given) if is_static else None
            why = f"{node.name} reads {x.name} in {name}, {role.scaling}"
            args = (x, name, -1, role.rounding, None, scales)
            self._quantized[key] = self.rewriter.call(operator, args, at=node, why=why)
        quantized = self._quantized[key]
        if is_mm:
            node.args = (quantized, *node.args[1:3], name, *node.args[4:])
        else:
            node.replace_input_with(x, quantized)
        self.rewriter.modified = True
        self.records.append(self._record(node, x, assignment, role))

    def _static_scales(
        self, node: torch.fx.Node, x: torch.fx.Node, role: Role,
        extremes: tuple[float, float] | None, given: tuple[float, ...] | None,
    ) -> list[torch.fx.Node]:  # fmt: skip
        """Buffers with the scale (and zero point) that are given, or that the format finds for
        ``extremes``, or else for the seen range."""
        key = (x, role.format, extremes, given)
        if key not in self._scales:
            if given is not None:
                parts, why = _given(given), f"the scale of {x.name}: given"
            else:
                how = "a pass chose its range"
                if extremes is None:
                    statistics = self._statistics(node, x)
                    extremes, how = (statistics.min, statistics.max), "in calibration"
                parts = _found(extremes, role)
                why = f"{x.name} in [{extremes[0]:.4g}, {extremes[1]:.4g}]: {how}"
            names = ("tensor_scale",) if parse(role.format).two_level else ("scale", "zero_point")
            self._scales[key] = [
                self.rewriter.constant(part, f"{x.name}_{name}", at=node, why=why)
                for part, name in zip(parts, names, strict=False)
            ]
        return self._scales[key]

    def _statistics(self, node: torch.fx.Node, x: torch.fx.Node) -> TensorStatistics:
        """What calibration saw of ``x``, or of the captured node that ``x`` stands for."""
        made = x.meta.get(PROVENANCE)
        source = made.source if isinstance(made, Provenance) else x.name
        found = self.rewriter.program.statistics
        statistics = found.get(x.name) or found.get(source)
        if statistics is None:
            raise CalibrationError(
                f"{describe(node)}: the scale of its input {x.name!r} is static and was not "
                "calibrated. Remedy: pass calibration= (example inputs, or a function that calls "
                "the model), or choose a recipe with dynamic scales, such as 'int8-dynamic'"
            )
        return statistics

    def _record(
        self, node: torch.fx.Node, x: torch.fx.Node, assignment: Assignment, role: Role
    ) -> TensorRecord:
        return TensorRecord(
            node=node.name,
            op=assignment.op,
            operand=x.name,
            role="fprop.x",
            shape=shape_of(x),
            decided_by=self.by,
            format=str(parse(role.format)),
            scale_kind=role.scaling,
            source=source_line(node),
            module=innermost_module(node),
            provenance=self._provenance(x, assignment, role),
        )

    def _provenance(
        self, x: torch.fx.Node, assignment: Assignment, role: Role
    ) -> ScaleProvenance:
        """Where its scale is from; the names of those that share it come last, in ``finish``."""
        fmt = parse(role.format)
        statistic, batches = f"{statistic_of(fmt)}, at run time", None
        if role.scaling == "static" and assignment.scales is not None:
            statistic = "given with the weights"
        elif role.scaling == "static" and assignment.extremes is not None:
            statistic = "a range that a pass chose"
        elif role.scaling == "static":
            seen = self._statistics(x, x)
            statistic, batches = "min and max of calibration", seen.batches
        if role.scaling == "static" and fmt.two_level:  # that of the blocks is never calibrated
            blocks = statistic_of(fmt).removesuffix(", and amax of the tensor")
            statistic = f"{blocks}, at run time, under one of the tensor: {statistic}"
        return ScaleProvenance(by=self.by, statistic=statistic, batches=batches, value=x.name)


def _given(scales: tuple[float, ...]) -> list[torch.Tensor]:
    scale, *zero_point = scales
    return [torch.tensor(scale, dtype=torch.float32),
            *(torch.tensor(int(zero), dtype=torch.uint8) for zero in zero_point)]


def _found(extremes: tuple[float, float], role: Role) -> list[torch.Tensor]:
    fmt = parse(role.format)
    _, *parts = quantize(torch.tensor(extremes, dtype=torch.float32), fmt).parts
    return parts[1:] if fmt.two_level else parts
