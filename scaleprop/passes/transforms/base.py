"""What the methods share: a method says where and which transform; everything else is here."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, describe, source_line
from scaleprop.passes.assign import ASSIGNMENT, Assignment, assignment_of
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.transforms.apply import apply
from scaleprop.passes.transforms.region import Region, find_region
from scaleprop.passes.transforms.transform import Transform
from scaleprop.report.records import TransformRecord
from scaleprop.rules import contraction_of
from scaleprop.rules.channels import Kind, sizes_of

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method reads of calibration. channels: figures per channel; sample: rows of each
    value that is read; moments: its second moment. Nothing: it is not calibrated."""

    channels: bool = False
    sample: int = 0
    moments: bool = False

    @property
    def anything(self) -> bool:
        """Whether calibration must run."""
        return self.channels or self.sample > 0 or self.moments


@dataclasses.dataclass(frozen=True)
class Site:
    """A value, and the contractions with a constant weight that read it.

    axis: of ``value``, that is summed over, counted from the end. readers: in graph order.
    """

    value: Node
    axis: int
    readers: tuple[Node, ...]

    @property
    def size(self) -> int:
        """How many channels it has."""
        return sizes_of(self.value)[self.axis]


@dataclasses.dataclass(frozen=True)
class TransformPass(Pass):
    """Put transforms of channels where a method says. Keeps the function.

    runtime: where parameters cannot absorb a transform, do it at run time, for the readers that
        profit from it; False: leave such values alone, and say why.
    only: names of the operators whose inputs may be transformed; None: all.
    """

    runtime: bool = True
    only: tuple[str, ...] | None = None

    preserves_function: ClassVar[bool] = True
    rewrites_parameters: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    @abc.abstractmethod
    def transform(self, work: Work) -> None:
        """Find regions and apply transforms, through ``work``."""

    def run(self, program: Program) -> PassResult:
        """The same function with other parameters; a record of each transform."""
        work = Work(program, self)
        self.transform(work)
        return work.result()


class Work:
    """A program while a method transforms it."""

    def __init__(self, program: Program, method: TransformPass) -> None:
        self.rewriter = Rewriter(program, method.name)
        self.method = method
        self.records: list[TransformRecord] = []
        self.notes: list[str] = []
        self.reassigned = False

    def sites(self, wanted: Callable[[Node], bool] | None = None) -> list[Site]:
        """Values read by linears and convolutions whose weights are constant, in graph order.

        wanted: which readers count; None: those that have been assigned a format.
        """
        found: dict[tuple[Node, int], list[Node]] = {}
        counts = wanted or (lambda node: assignment_of(node) is not None)
        for node in self.rewriter.graph.nodes:
            contraction = contraction_of(node)
            if contraction is None or contraction.kind not in ("linear", "conv"):
                continue
            operand = contraction.operand("activation")
            source: Any = node.args[operand.argument] if operand else None
            if operand is None or not isinstance(source, Node) or not counts(node):
                continue
            if self.rewriter.constant_value(node.args[1]) is not None:
                found.setdefault((source, operand.axes[0]), []).append(node)
        return [Site(value, axis, tuple(readers)) for (value, axis), readers in found.items()
                if all(self._may(reader) for reader in readers)]  # fmt: skip

    def _may(self, reader: Node) -> bool:
        return self.method.only is None or reader.name in self.method.only

    def current(self, site: Site) -> Site:
        """The site after transforms at run time: its readers read what they made of its value."""
        operand: Any = contraction_of(site.readers[0]).operand("activation")  # type: ignore[union-attr]
        return dataclasses.replace(site, value=site.readers[0].args[operand.argument])

    def region(
        self,
        site: Site,
        kind: Kind,
        *,
        block: int | None = None,
        allows: Callable[[Region], bool] = lambda region: region.is_free,
    ) -> Region | None:
        """Where a transform of the site's channels may live: everywhere, at no cost; else, with
        ``runtime``, at the site alone; else nowhere, which is recorded."""
        region = find_region(site.value, kind, axes=(site.axis,), block=block)
        if allows(region):
            return region
        if self.method.runtime:
            return find_region(site.value, kind, axes=(site.axis,), block=block,
                               only_users=site.readers)
        self.refuse(site.value, kind, "; ".join(str(cut) for cut in region.cuts[:3]))
        return None

    def covered(self, region: Region, sites: Iterable[Site]) -> list[Site]:
        """The sites whose values carry the region's transform, for all of their readers."""
        cut = {(item.value, item.user) for item in region.cuts}
        return [site for site in sites
                if (layout := region.layout(site.value)) is not None
                and len(layout.axes) == 1
                and all((site.value, reader) not in cut for reader in site.readers)]  # fmt: skip

    def pooled(
        self, region: Region, values: Mapping[Site, Tensor], *, largest: bool = True
    ) -> Tensor:
        """[size of the region] float64: of numbers per channel of each site, the largest (or
        least) that belongs to each of the region's channels; NaN for channels of no site."""
        empty = -torch.inf if largest else torch.inf
        found = torch.full((region.size,), empty, dtype=torch.float64)
        for site, numbers in values.items():
            layout = region.members[site.value]
            codes = torch.from_numpy(layout.codes).reshape(-1)
            carried = codes >= 0
            found.scatter_reduce_(0, codes[carried] >> 1, numbers.double()[carried],
                                  "amax" if largest else "amin")  # fmt: skip
        found = region.pooled(found, largest)
        return torch.where(found == empty, torch.nan, found)

    def statistics(self, site: Site) -> TensorStatistics:
        """What calibration saw of the site's value.

        Raises:
            CalibrationError: where it has not seen it, or its channels changed their number.
        """
        seen = self.rewriter.program.statistics.get(site.value.name)
        if seen is None or seen.channel_amax is None or len(seen.channel_amax) != site.size:
            raise CalibrationError(
                f"{describe(site.value)} was not calibrated, or not along its channels. Remedy: "
                f"pass calibration= (example inputs, or a function that calls the model), which "
                f"{self.method.name!r} needs"
            )
        return seen

    def amax(self, site: Site) -> Tensor:
        """[K]: the largest magnitude that calibration saw of the site's value, per channel."""
        found = self.statistics(site).channel_amax
        assert found is not None
        return found

    def weight(self, reader: Node) -> Tensor:
        """The constant weight of a reader, float64: [N, K] of a linear, [O, I/groups, taps…]."""
        value = self.rewriter.constant_value(reader.args[1])
        assert value is not None
        return value.detach().double()

    def weight_amax(self, site: Site) -> Tensor:
        """[K]: the largest magnitude of the site's readers' weights, per input channel."""
        found = [_input_amax(self.weight(reader), site.size) for reader in site.readers]
        return torch.stack(found).amax(0)

    def assignment(self, reader: Node) -> Assignment | None:
        """The formats that a reader's operands will get."""
        return assignment_of(reader)

    def assign(self, reader: Node, **changes: Any) -> None:
        """Change what a reader's operands will become: fields of its ``Assignment``."""
        if (old := assignment_of(reader)) is not None:
            new = dataclasses.replace(old, **changes)
            self.reassigned |= new != old
            reader.meta[ASSIGNMENT] = new

    def readers(self, region: Region) -> tuple[Node, ...]:
        """The operators to be quantized that read a value as the region has it."""
        cut = {(item.value, item.user) for item in region.cuts}
        return tuple(dict.fromkeys(
            reader for value in region.members for reader in value.users
            if assignment_of(reader) is not None and (value, reader) not in cut))  # fmt: skip

    def apply(self, region: Region, transform: Transform, why: str) -> bool:
        """Put ``transform`` into ``region``, and record it; False where ``only`` forbids it."""
        readers = self.readers(region)
        if not all(self._may(reader) for reader in readers):
            return False
        absorbed = tuple(dict.fromkeys(
            str(item.operand.target) if item.operand is not None else
            f"{item.user.name}.{item.slot}" for item in region.absorbed))  # fmt: skip
        record = TransformRecord(
            by=self.method.name, kind=region.kind, seed=region.seed.name,
            members=len(region.members), absorbed=absorbed,
            readers=tuple(reader.name for reader in readers),
            runtime=tuple(str(cut) for cut in region.cuts if _costs(cut, region)),
            source=source_line(region.seed),
        )  # fmt: skip
        for value in region.members:
            for reader in value.users:  # what was chosen for the value as it was
                self.assign(reader, extremes=None)
        apply(self.rewriter, region, transform, f"{why} ({region.seed.name})")
        self.records.append(record)
        return True

    def refuse(self, seed: Node, kind: Kind, reason: str) -> None:
        """Record that nothing was done at ``seed``, and why."""
        self.records.append(TransformRecord(by=self.method.name, kind=kind, seed=seed.name,
                                            refused=reason, source=source_line(seed)))  # fmt: skip

    def result(self) -> PassResult:
        """The program so far. Its statistics, of values that were transformed, are dropped."""
        program = self.rewriter.finish()
        applied = [record for record in self.records if record.refused is None]
        free = sum(not record.runtime for record in applied)
        notes = [f"{len(applied)} transforms, {free} of them at no cost at run time"]
        refused = len(self.records) - len(applied)
        notes += [f"{refused} refused: the report says why"] if refused else []
        program = program.replace(transforms=(*program.transforms, *self.records), statistics={}
                                  if self.rewriter.modified else program.statistics)  # fmt: skip
        modified = self.rewriter.modified or self.reassigned
        return PassResult(program, modified, (*notes, *self.notes))


def _costs(cut: Any, region: Region) -> bool:
    """A reader that is cut off reads the value as it was, where that is still there."""
    made = {item.value for item in region.cuts if item.user is None}
    return cut.user is None or cut.value not in made


def _input_amax(weight: Tensor, channels: int) -> Tensor:
    """[K]: per input channel; of a convolution in groups, each group's own outputs."""
    magnitudes = weight.abs().flatten(2).amax(-1) if weight.ndim > 2 else weight.abs()
    groups = channels // weight.shape[1]
    return magnitudes.reshape(groups, -1, weight.shape[1]).amax(1).reshape(-1)
