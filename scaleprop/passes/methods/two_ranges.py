"""Two ranges: values that hardly fall below 0 get a finer step there than above.

    x ≥ 0:  Δ·min(⌊x/Δ⌉, L)        x < 0:  δ·max(⌊x/δ⌉, −L−1),   δ = Δ·2^−m,   L = 2^(b−1) − 1

One bit says which range, so a code has b bits as before; the ratio is a power of two, so sums of
both are sums and shifts. Values behind a GELU are of that kind (Z. Yuan et al., PTQ4ViT,
arXiv:2111.12293, twin uniform quantization; Y.-S. Tai, A.-Y. Wu, MPTQ-ViT, arXiv:2401.14895, find m
from data; of the latter the abstract is the source). Here m is the one of least error of the
readers' outputs, weights as they are, and Δ spans the largest value that calibration saw. Which
values have such ranges is read off the values, not off the operator before. What runs are ordinary
operators, an emulation on every backend.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, ConfigError, describe, source_line
from scaleprop.formats import fake_quantize, parse, quantize
from scaleprop.formats.elements import IntegerElement
from scaleprop.passes.provenance import innermost_module
from scaleprop.passes.rewrite import shape_of
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.walk import extremes
from scaleprop.recipes.base import Role
from scaleprop.report.records import ScaleProvenance, TensorRecord

aten: Any = torch.ops.aten

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class TwoRanges(TransformPass):
    """Give values below 0 a finer step, a power of two apart (twin uniform quantization).

    asymmetry: how many times the largest value exceeds the least one's magnitude, at least.
    powers: the largest m. It quantizes activations itself, so it comes after all transforms.
    """

    asymmetry: float = 2.0
    powers: int = 8

    name: ClassVar[str] = "two-ranges"
    preserves_function: ClassVar[bool] = False
    rewrites_parameters: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an asymmetry below 1 or negative powers."""
        if self.asymmetry < 1 or self.powers < 0:
            raise ConfigError(f"asymmetry={self.asymmetry} must be at least 1, and powers="
                              f"{self.powers} at least 0")  # fmt: skip

    def transform(self, work: Work) -> None:
        """Every value of linears that is quantized to integers with one scale."""
        records: list[TensorRecord] = []
        for site in work.sites():
            role = _role(work, site)
            if role is None:
                continue
            low, high = (float(end) for end in _ends(work, site))
            if low < 0 < high and high >= -self.asymmetry * low:
                records += _round(work, site, role, high, self)
        if records:
            program = work.rewriter.program
            work.rewriter.program = program.replace(records=(*program.records, *records))
            work.rewriter.modified = True
        work.notes.append(f"{len(records)} operands read two ranges")


def _ends(work: Work, site: Site) -> tuple[Tensor, Tensor]:
    low, high = extremes(work, site)
    return low.min(), high.max()


def _role(work: Work, site: Site) -> Role | None:
    """The format that all readers ask for, if ranges can be told apart in it."""
    found = [work.assignment(reader) for reader in site.readers]
    roles = {item.activation if item is not None and item.contraction.kind == "linear" else None
             for item in found}  # fmt: skip
    role = roles.pop() if len(roles) == 1 else None
    if role is None:
        return None
    fmt = parse(role.format)
    integer = isinstance(fmt.element, IntegerElement) and fmt.granularity.kind == "tensor"
    return role if integer else None


def two_ranges(x: Tensor, step: float, power: int, levels: int) -> Tensor:
    """x on both grids, as the derivation has it; levels: L."""
    fine = step * 2.0**-power
    above = (x * (1 / step)).round().clamp(0, levels) * step
    return above + (x * (1 / fine)).round().clamp(-levels - 1, 0) * fine


def _round(
    work: Work, site: Site, role: Role, high: float, options: TwoRanges
) -> list[TensorRecord]:
    fmt, x = parse(role.format), site.value
    rows = work.statistics(site).sample
    if rows is None or len(rows) == 0:
        raise CalibrationError(f"{describe(x)}: calibration kept no rows of it. Remedy: run "
                               "calibrate{sample=256} before")
    weight = torch.cat([work.weight(reader).float() for reader in site.readers])

    def error(rounded: Tensor) -> float:
        return float(((rounded - rows) @ weight.mT).double().square().sum())

    ends = torch.stack(_ends(work, site)).float()
    plain = error(fake_quantize(rows, fmt, scales=quantize(ends, fmt).parts[1:]))
    levels = 2 ** (fmt.bits - 1) - 1
    step = high / levels
    errors = [error(two_ranges(rows, step, power, levels)) for power in range(options.powers + 1)]
    power = errors.index(min(errors))
    if not errors[power] < plain:
        work.notes.append(f"{x.name}: one range is as good as two")
        return []
    _emit(work, site, step, power, levels)
    found: list[TensorRecord] = []
    for reader in site.readers:
        assignment = work.assignment(reader)
        assert assignment is not None
        work.assign(reader, activation=None)
        found.append(TensorRecord(
            node=reader.name, op=assignment.op, operand=x.name, role="fprop.x", shape=shape_of(x),
            decided_by=options.name, format=str(fmt), scale_kind="static",
            source=source_line(reader), module=innermost_module(reader),
            provenance=ScaleProvenance(
                by=options.name, value=x.name, batches=work.statistics(site).batches,
                statistic=f"steps 2^{power} apart of least error in the readers' outputs, on "
                          "sampled rows of calibration")))  # fmt: skip
    return found


def _emit(work: Work, site: Site, step: float, power: int, levels: int) -> None:
    x, at = site.value, site.readers[0]
    why = f"two ranges, steps 2^{power} apart"

    def call(op: Any, *args: Any) -> Node:
        return work.rewriter.call(op, args, at=at, why=why)

    def grid(width: float, low: int, high: int) -> Node:
        units = call(aten.round.default, call(aten.mul.Tensor, x, 1 / width))
        return call(aten.mul.Tensor, call(aten.clamp.default, units, low, high), width)

    rounded = call(aten.add.Tensor, grid(step, 0, levels), grid(step * 2.0**-power, -levels - 1, 0))
    for reader in site.readers:
        reader.replace_input_with(x, rounded)
