"""Runtime smooth: what is quantized is divided by channel magnitudes that are found at run time.

    m_j = max over all tokens of |x_j|
    s_j = the largest m of j's group, channels being grouped in descending order of m
    y = Σ_j s_j·Q(x / s)_j·ŵ_j

(Ke Yi et al., Rotated Runtime Smooth, arXiv:2409.20361, section 3.) No statistics are needed, and
weights stay as they are: nothing moves to them. After a rotation (``rotate``, then this: RRS) no
token sticks out of a channel, and s fits all of them.

The paper's kernel permutes x and w at run time, so that each block of K has one s, and multiplies
the block's partial sum by it. The order says only which channels share an s, though: here s goes
back to the channels' own places, and to the other side of rounding, s·Q(x / s), which is the same
sum. So weights are not gathered, whatever their format, and all operators are ordinary ones. The
price: no kernel of integers has a factor for each k, so the product reads s·Q(x / s) in high
precision, and weights in theirs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx

from scaleprop.errors import ConfigError, source_line
from scaleprop.formats import parse
from scaleprop.passes.assign import ASSIGNMENT
from scaleprop.passes.operators import FAKE_QUANTIZE
from scaleprop.passes.provenance import innermost_module, statistic_of
from scaleprop.passes.rewrite import shape_of
from scaleprop.passes.transforms.base import Site, TransformPass, Work
from scaleprop.recipes.base import Role
from scaleprop.report.records import ScaleProvenance, TensorRecord, TransformRecord

aten: Any = torch.ops.aten

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class RuntimeSmooth(TransformPass):
    """Divide what is quantized at run time by its channels' magnitudes (RRS after a rotation).

    group: how many channels share a magnitude; the largest divisor of their number up to it.
    reorder: group channels of like magnitude; False: neighbours.
    It quantizes activations itself, dynamically, so it comes after all transforms.
    """

    group: int = 128
    reorder: bool = True

    name: ClassVar[str] = "runtime-smooth"
    preserves_function: ClassVar[bool] = False  # it rounds

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a group of no channels, or where nothing may run."""
        if self.group < 1:
            raise ConfigError(f"group={self.group} is a number of channels, at least 1")
        if not self.runtime:
            raise ConfigError("runtime-smooth is an operator at run time: drop runtime=false")

    def transform(self, work: Work) -> None:
        """Every activation that is to be quantized dynamically."""
        records: list[TensorRecord] = []
        for site in work.sites():
            roles: dict[Role, list[Node]] = {}
            for reader in site.readers:
                assignment = work.assignment(reader)
                if assignment is not None and assignment.activation is not None:
                    roles.setdefault(assignment.activation, []).append(reader)
            for role, readers in roles.items():
                reason = _reason_against(site, role)
                if reason is not None:
                    work.refuse(site.value, "scale", reason)
                    continue
                records += _rewrite(work, site, role, readers, self)
        if records:
            program = work.rewriter.program
            work.rewriter.program = program.replace(records=(*program.records, *records))
            work.rewriter.modified = True


def _reason_against(site: Site, role: Role) -> str | None:
    if role.scaling == "static":
        return "its scale is static: magnitudes of run time would not fit it"
    if len(shape_of(site.value)) == 1:
        return "it is one token"
    return None


def _rewrite(
    work: Work, site: Site, role: Role, readers: list[Node], options: RuntimeSmooth
) -> list[TensorRecord]:
    """Let ``readers`` read s·Q(x / s); their activations' records."""
    name, x = str(parse(role.format)), site.value
    why = f"{x.name} is divided by what its channels reach, and rounded to {name}"
    scale = _scale(work, site, readers[0], why, options)

    def call(op: Any, *args: Any) -> Node:
        return work.rewriter.call(op, args, at=readers[0], why=why)

    rounded = call(FAKE_QUANTIZE, call(aten.div.Tensor, x, scale), name, -1, role.rounding)
    restored = call(aten.mul.Tensor, rounded, scale)
    records: list[TensorRecord] = []
    for reader in readers:
        assignment = reader.meta[ASSIGNMENT]
        reader.replace_input_with(x, restored)
        reader.meta[ASSIGNMENT] = dataclasses.replace(assignment, activation=None)
        records.append(TensorRecord(
            node=reader.name, op=assignment.op, operand=x.name, role="fprop.x", shape=shape_of(x),
            decided_by=options.name, format=name, scale_kind="dynamic",
            source=source_line(reader), module=innermost_module(reader),
            provenance=ScaleProvenance(
                by=options.name, value=x.name,
                statistic=f"{statistic_of(parse(role.format))}, at run time, its channels divided "
                          "by what they reach")))  # fmt: skip
    work.records.append(TransformRecord(
        by=options.name, kind="scale", seed=x.name, members=1, source=source_line(x),
        runtime=(f"before {readers[0].name!r}: channels are divided by what they reach",),
    ))  # fmt: skip
    return records


def _scale(work: Work, site: Site, at: Node, why: str, options: RuntimeSmooth) -> Node:
    """s, shaped to multiply the site's value."""

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        return work.rewriter.call(op, args, kwargs, at=at, why=why)

    x, size = site.value, site.size
    rank = len(shape_of(x))
    others = [axis for axis in range(rank) if axis != rank + site.axis]
    least = torch.finfo(x.meta["val"].dtype).tiny  # channels that are 0 everywhere
    magnitude = call(aten.clamp_min.default,
                     call(aten.amax.default, call(aten.abs.default, x), others), least)
    group = max(n for n in range(1, min(options.group, size) + 1) if size % n == 0)
    if group > 1:
        order = None
        if options.reorder and group < size:
            magnitude, order = _sorted(call, magnitude, descending=True)
        shape = [size // group, group]
        largest = call(aten.amax.default, call(aten.reshape.default, magnitude, shape), [1], True)
        spread = call(aten.expand.default, largest, shape)
        magnitude = call(aten.reshape.default, spread, [size])
        if order is not None:
            _, places = _sorted(call, order, descending=False)
            magnitude = call(aten.index_select.default, magnitude, 0, places)
    shape = [size, *[1] * (-site.axis - 1)]
    return magnitude if len(shape) == 1 else call(aten.reshape.default, magnitude, shape)


def _sorted(call: Callable[..., Node], x: Node, *, descending: bool) -> tuple[Node, Node]:
    """Values and places; equal ones keep their order, on every backend."""
    pair = call(aten.sort.stable, x, stable=True, dim=0, descending=descending)
    return call(operator.getitem, pair, 0), call(operator.getitem, pair, 1)
