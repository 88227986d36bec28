"""What each format would cost, tensor by tensor, without changing the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram

from scaleprop.analysis.compiled import values_of
from scaleprop.analysis.outliers import Detector, with_difficulty_after
from scaleprop.calibration import TensorStatistics
from scaleprop.calibration.feed import feed, refuse_bare
from scaleprop.calibration.observer import Observer, Tally
from scaleprop.errors import source_line
from scaleprop.formats import fake_quantize, parse
from scaleprop.passes.base import Pass, PassManager, Program
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.pipeline import parse_pass
from scaleprop.passes.provenance import innermost_module
from scaleprop.passes.statistics import Sums
from scaleprop.report import Report
from scaleprop.report.records import TensorRecord
from scaleprop.rules import Contraction, contraction_of
from scaleprop.signature import Signature, split_example

WEIGHT_FORMATS = ("int8[row]*f32", "int4[1x128]*f32", "e4m3[row]*f32",
                  "mxfp8", "mxfp6", "mxfp4", "nvfp4")
ACTIVATION_FORMATS = ("int8[tensor]*f32+zp", "int8[row]*f32", "e4m3[row]*f32",
                      "mxfp8", "mxfp6", "mxfp4", "nvfp4")
_PIECE = 1 << 18  # elements that are in float64 at a time
OUTLIER = 32.0  # amax/rms above which int8 keeps fewer than two bits for a typical value
POOR = 20.0  # SQNR in decibels: a tenth of the signal is noise
_NAMED = 8  # how many tensors a note lists


class _Operand:
    """One operand of one contraction: its statistics, and what each format would do to it.

    Sums are in float64 and over all batches, in constant memory; a weight is counted once.
    """

    def __init__(self, node: torch.fx.Node, place: int, axis: int) -> None:
        self.node, self.place, self.axis = node, place, axis
        self.source: Any = node.args[place]
        self.is_weight = self.source.op == "get_attr"
        names = WEIGHT_FORMATS if self.is_weight else ACTIVATION_FORMATS
        self.formats = tuple(parse(name) for name in names)
        self.noise = [0.0] * len(names)
        self.underflowed = [0] * len(names)
        self._tally = Tally()
        self.sums = Sums()

    @property
    def seen(self) -> TensorStatistics:
        """Statistics of the operand's values; a program was run, so there are some."""
        total = self._tally.total
        assert total is not None
        return total

    def add(self, value: torch.Tensor) -> None:
        """Count one batch."""
        if self.is_weight and self._tally.total is not None:
            return
        x = value.flatten(1) if self.is_weight and value.dim() > 2 else value
        self._tally.add(x)
        for piece in x.detach().reshape(-1).split(_PIECE):
            self.sums.add(piece)
        for index, fmt in enumerate(self.formats):
            rounded = fake_quantize(x, fmt, axis=self.axis)
            self.noise[index] += float((x - rounded).double().square().sum())
            self.underflowed[index] += int(((rounded == 0) & (x != 0)).sum())

    def sqnr_db(self, index: int) -> float:
        """Of one format."""
        if self.noise[index] == 0:
            return math.inf
        return 10 * math.log10(self.seen.sum_of_squares / self.noise[index])


def _operands(program: Program) -> list[_Operand]:
    """The operands of contractions that a format can apply to, in graph order."""
    return [
        _Operand(node, operand.argument, -1 if operand.role == "weight" else operand.axes[0])
        for node in program.module.graph.nodes
        if (contraction := contraction_of(node)) is not None and contraction.kind != "attention"
        and not _is_transposed(node, contraction)
        for operand in contraction.operands
        if operand.role != "bias" and operand.argument < len(node.args)
        and _is_float(node.args[operand.argument])
    ]


def _is_transposed(node: torch.fx.Node, contraction: Contraction) -> bool:
    """Whether the rows of a weight are summed as well: then no format has a scale for each."""
    weight = contraction.operand("weight")
    source: Any = node.args[weight.argument] if weight is not None else None
    return weight is not None and contraction.kind == "conv" and \
        -source.meta["val"].dim() in weight.axes


def _is_float(argument: Any) -> bool:
    value = argument.meta.get("val") if isinstance(argument, torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _shape(node: torch.fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def compare_formats(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    calibration: Iterable[Any] | Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Sequence[str | Pass] = (),
) -> Report:
    """``analyze`` without a loss: see there."""
    refuse_bare(calibration)
    steps = [parse_pass(item) if isinstance(item, str) else item for item in passes]
    args, kwargs = split_example(example_inputs)
    captured = capture(model, args, kwargs, dynamic_shapes)
    Signature.of(captured).flatten(args, kwargs)  # tracing may have chosen other sizes
    program = PassManager([CleanUp(), Canonicalise()]).run(captured)
    operands = _operands(program)
    detector = Detector(program)
    watched: dict[str, list[Callable[[torch.Tensor], None]]] = {}
    for operand in operands:
        watched.setdefault(operand.source.name, []).append(operand.add)
    for name, add in detector.watched.items():
        watched.setdefault(name, []).append(add)
    data: Any = [(args, kwargs)] if calibration is None else calibration
    if steps and not callable(data):
        data = list(data)  # read again for what comes after the passes
    adders = {name: _adder(found) for name, found in watched.items()}
    feed(data, program, Observer(program.module, adders, calls=detector.calls))
    outliers = detector.table()
    if steps:
        outliers = with_difficulty_after(outliers, program, steps, data)
    records = [record for operand in operands for record in _records(operand)]
    return Report(records=tuple(records), notes=(*program.notes, *_notes(operands)),
                  outliers=outliers)


def _adder(several: Sequence[Callable[[torch.Tensor], None]]) -> Callable[[torch.Tensor], None]:
    def add(value: torch.Tensor) -> None:
        for one in several:
            one(value)

    return add


def _records(operand: _Operand) -> list[TensorRecord]:
    node, seen = operand.node, operand.seen
    values = values_of(operand.sums.total())
    return [
        TensorRecord(
            node=node.name, op=str(node.target), operand=str(operand.source),
            role="fprop.w" if operand.is_weight else "fprop.x",
            shape=_shape(operand.source), decided_by="analyze", format=str(fmt),
            scale_kind="weight" if operand.is_weight else "dynamic",
            sqnr_db=operand.sqnr_db(index),
            underflowed=operand.underflowed[index] / seen.count if seen.count else None,
            source=source_line(node), module=innermost_module(node), values=values,
            lowering=f"amax {seen.amax:.3g}, rms {seen.rms:.3g}",
        )
        for index, fmt in enumerate(operand.formats)
    ]


def _notes(operands: Sequence[_Operand]) -> list[str]:
    peaks = sorted(((operand.seen.amax / operand.seen.rms, operand) for operand in operands
                    if operand.seen.rms), key=lambda item: -item[0])
    notes = [f"outliers: operand {operand.source} of {operand.node.name} peaks at {peak:.0f}× its "
             f"rms" for peak, operand in peaks[:_NAMED] if peak > OUTLIER]
    hurt: dict[str, list[tuple[float, str]]] = {}
    for operand in operands:
        for index, fmt in enumerate(operand.formats):
            if (sqnr := operand.sqnr_db(index)) < POOR:
                where = f"{operand.source} of {operand.node.name}"
                hurt.setdefault(str(fmt), []).append((sqnr, where))
    for name, tensors in hurt.items():
        worst = ", ".join(f"{where} ({sqnr:.1f} dB)" for sqnr, where in sorted(tensors)[:3])
        notes.append(f"{name} would leave {len(tensors)} tensors below {POOR:.0f} dB: {worst}")
    return notes
