"""``analyze``: what each format would cost, tensor by tensor, without changing the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from scaleprop.errors import CalibrationError, describe, source_line
from scaleprop.formats import ScaledFormat, fake_quantize, parse
from scaleprop.passes.base import PassManager, Program
from scaleprop.passes.calibrate import feed, refuse_bare, refuse_empty
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.report import Report
from scaleprop.report.records import Role, TensorRecord
from scaleprop.rules import contraction_of
from scaleprop.signature import Signature, split_example

WEIGHT_FORMATS = ("int8[row]*f32", "int4[1x128]*f32", "e4m3[row]*f32",
                  "mxfp8", "mxfp6", "mxfp4", "nvfp4")
ACTIVATION_FORMATS = ("int8[tensor]*f32+zp", "int8[row]*f32", "e4m3[row]*f32",
                      "mxfp8", "mxfp6", "mxfp4", "nvfp4")
OUTLIER = 32.0  # amax/rms above which int8 keeps fewer than two bits for a typical value
POOR = 20.0  # SQNR in decibels: a tenth of the signal is noise
_NAMED = 8  # how many tensors a note lists


@dataclasses.dataclass
class _Sums:
    """Streaming sums over one tensor, in float64: constant memory whatever the data."""

    role: Role
    shape: tuple[int | str, ...]
    formats: tuple[ScaledFormat, ...]
    noise: list[float]
    underflowed: list[int]
    count: int = 0
    amax: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, role: Role, shape: tuple[int | str, ...], names: Sequence[str]) -> _Sums:
        formats = tuple(parse(name) for name in names)
        return cls(role, shape, formats, [0.0] * len(formats), [0] * len(formats))

    def add(self, x: torch.Tensor, axis: int) -> None:
        """Count ``x``, quantized along ``axis``."""
        self.count += x.numel()
        self.amax = max(self.amax, float(x.abs().max()) if x.numel() else 0.0)
        self.squares += float(x.double().square().sum())
        for index, fmt in enumerate(self.formats):
            rounded = fake_quantize(x, fmt, axis=axis)
            self.noise[index] += float((x - rounded).double().square().sum())
            self.underflowed[index] += int(((rounded == 0) & (x != 0)).sum())

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def sqnr_db(self, index: int) -> float:
        if self.noise[index] == 0:
            return math.inf
        return 10 * math.log10(self.squares / self.noise[index])


class _Observer(torch.fx.Interpreter):
    """Runs a program and sums up every operand of every contraction."""

    def __init__(self, program: Program, sums: dict[tuple[torch.fx.Node, int], _Sums]) -> None:
        super().__init__(program.module)
        self._sums = sums
        self.batch = 0

    def run_node(self, n: torch.fx.Node) -> Any:
        for place, axis in _watched(n):
            key = (n, place)
            source = n.args[place]
            if not isinstance(source, torch.fx.Node):
                continue
            is_weight = source.op == "get_attr"
            if is_weight and key in self._sums:
                continue
            x = self.env[source]
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            if not x.isfinite().all():
                raise CalibrationError(f"{describe(n)}: operand {place} of batch {self.batch} "
                                       f"holds NaN or Inf")
            if key not in self._sums:
                role: Role = "fprop.w" if is_weight else "fprop.x"
                names = WEIGHT_FORMATS if is_weight else ACTIVATION_FORMATS
                self._sums[key] = _Sums.of(role, _shape(source), names)
            self._sums[key].add(x.flatten(1) if is_weight and x.dim() > 2 else x, axis)
        return super().run_node(n)


class _Observed(torch.nn.Module):
    """What a calibration function calls: the model's signature, observed."""

    def __init__(self, program: Program, observer: _Observer, signature: Signature) -> None:
        super().__init__()
        self._program, self._observer, self._signature = program, observer, signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs."""
        leaves = self._signature.flatten(args, kwargs)
        with torch.no_grad():
            outputs = self._observer.run(*leaves, enable_io_processing=False)
        self._observer.batch += 1
        return pytree.tree_unflatten(outputs, self._program.out_spec)


def _watched(node: torch.fx.Node) -> list[tuple[int, int]]:
    """(argument, axis that is contracted) of the operands that a format can apply to."""
    contraction = contraction_of(node)
    if contraction is None or contraction.kind == "attention":
        return []
    return [(operand.argument, -1 if operand.role == "weight" else operand.axes[0])
            for operand in contraction.operands
            if operand.role != "bias" and operand.argument < len(node.args)]


def _shape(node: torch.fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def analyze(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    calibration: Iterable[Any] | Callable[[Any], Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Report:
    """What each format would cost on each operand of each contraction. Nothing is changed.

    Args:
        model, example_inputs, dynamic_shapes: as for ``compile``.
        calibration: what to measure on instead of ``example_inputs``: an iterable of inputs, or
            ``f(model)`` that runs the model. Statistics are summed over all of them.

    Returns:
        A report without recipe: one record per operand and candidate format with its SQNR and
        underflow, and notes that name outliers and the tensors each format would hurt.

    Raises:
        CaptureError, ConfigError: as ``compile``.
        CalibrationError: where ``calibration`` is empty or a single batch, or a tensor is NaN or
            Inf, naming node and batch.
    """
    refuse_bare(calibration)
    args, kwargs = split_example(example_inputs)
    captured = capture(model, args, kwargs, dynamic_shapes)
    program = PassManager([CleanUp(), Canonicalise()]).run(captured)
    sums: dict[tuple[torch.fx.Node, int], _Sums] = {}
    observer = _Observer(program, sums)
    signature = Signature.of(program)
    feed([(args, kwargs)] if calibration is None else calibration,
         _Observed(program, observer, signature))
    refuse_empty(observer.batch)
    records = [record for (node, place), found in sums.items()
               for record in _records(node, place, found)]
    return Report(records=tuple(records), notes=(*program.notes, *_notes(sums)))


def _records(node: torch.fx.Node, place: int, found: _Sums) -> list[TensorRecord]:
    return [
        TensorRecord(
            node=node.name, op=str(node.target), operand=str(node.args[place]), role=found.role,
            shape=found.shape, decided_by="analyze", format=str(fmt),
            scale_kind="weight" if found.role == "fprop.w" else "dynamic",
            sqnr_db=found.sqnr_db(index), underflowed=found.underflowed[index] / found.count
            if found.count else None,
            source=source_line(node),
            lowering=f"amax {found.amax:.3g}, rms {found.rms:.3g}",
        )
        for index, fmt in enumerate(found.formats)
    ]


def _notes(sums: dict[tuple[torch.fx.Node, int], _Sums]) -> list[str]:
    peaks = sorted(((found.amax / found.rms, node, place) for (node, place), found in sums.items()
                    if found.rms), key=lambda item: -item[0])
    notes = [f"outliers: operand {node.args[place]} of {node.name} peaks at {peak:.0f}× its rms"
             for peak, node, place in peaks[:_NAMED] if peak > OUTLIER]
    hurt: dict[str, list[tuple[float, str]]] = {}
    for (node, place), found in sums.items():
        for index, fmt in enumerate(found.formats):
            if (sqnr := found.sqnr_db(index)) < POOR:
                hurt.setdefault(str(fmt), []).append((sqnr, f"{node.args[place]} of {node.name}"))
    for name, tensors in hurt.items():
        worst = ", ".join(f"{where} ({sqnr:.1f} dB)" for sqnr, where in sorted(tensors)[:3])
        notes.append(f"{name} would leave {len(tensors)} tensors below {POOR:.0f} dB: {worst}")
    return notes
