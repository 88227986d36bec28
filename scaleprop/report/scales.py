"""How large every value of a training step is: measured, predicted, and line by line.

JSON schema, version 1 (``ScaleReport.save("x.json")``, ``to_dict``)::

    schema          "scaleprop.scales"
    schema_version  1
    model           what was looked at
    tensors         list of objects with the fields of ``TensorScale``; exponents as [[e, count], …]
    visits          list of objects with the fields of ``Visit``
    listings        list of objects with the fields of ``Listing``
    findings        list of objects with the fields of ``Finding``
    unknown         operator → how often nothing could be predicted of its output
    notes           list of sentences
    block           a picture of one block, see ``report.graph.Block``; may be left out
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from scaleprop.errors import ConfigError
from scaleprop.report.files import write_report
from scaleprop.report.graph.model import Block
from scaleprop.report.schema import part_schema, problem

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "scaleprop.scales"
SCHEMA_VERSION = 1
# formats that values are held against, as they are, without a scale
FORMATS = ("e4m3", "e5m2", "e2m1", "f16", "bf16")
# share of a tensor's values other than 0 that a format may lose before it is said. A choice: it
# names the tensors in which a whole tail is gone, not those of which the odd value is
LOST = 0.01
Phase = Literal["input", "parameter", "forward", "backward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorScale:
    """One float tensor of a training step.

    node, op: where it is made. phase: ``backward`` depends on the loss's gradient. name: the
    parameter that it is, or is the gradient of. read_in: the passes in which a matrix product or
    convolution reads it.
    amax, rms, mean, kurtosis (3 for a normal), exponents (⌊log2 |x|⌋ → count): measured, of what is
    finite and not masked. Shares: zeros; masked: −∞, or what stands for it, that masks a softmax;
    nonfinite: NaN, and any other ±∞. predicted: RMS by the operators' rules; None where nothing is
    known of it. underflow, overflow: format → share of values other than 0 that are smaller than
    its smallest positive number, or larger than its largest; NaN and ±∞ are, in every format.
    """

    node: str
    op: str
    phase: Phase
    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    module: str
    read_in: tuple[str, ...]
    count: int
    amax: float
    rms: float
    mean: float
    kurtosis: float | None
    zeros: float
    masked: float
    exponents: Mapping[int, int]
    predicted: float | None
    underflow: Mapping[str, float]
    overflow: Mapping[str, float]
    nonfinite: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Predicted ÷ measured RMS; None where either is unknown or 0."""
        return self.predicted / self.rms if self.predicted and self.rms else None

    @property
    def flags(self) -> tuple[str, ...]:
        """``e4m3 ↓43 %``: what would be lost in which format, below (↓) or above (↑) its range;
        and what is no number as it is."""
        bad = (f"NaN or Inf {100 * self.nonfinite:.2g} %",) if self.nonfinite else ()
        return (*bad, *(f"{name} {arrow}{100 * share:.0f} %"
                        for arrow, shares in (("↑", self.overflow), ("↓", self.underflow))
                        for name, share in shares.items() if share > LOST))


@dataclasses.dataclass(frozen=True)
class Visit:
    """One run through a line, in one module: RMS of the last float value that it made, and of the
    loss's gradient with respect to that value; None where it has none."""

    file: str
    line: int
    module: str
    forward: float
    backward: float | None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The text of one function: ``lines`` from line ``first`` of ``file``."""

    file: str
    first: int
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One observation on a model's signal propagation.

    name: of the kind of finding. warning: whether a threshold was passed; else it is information.
    message: what was seen. figures: the numbers behind it. advice: what the literature says, with
    references. where: source lines that it is about.
    """

    name: str
    warning: bool
    message: str
    figures: Mapping[str, tuple[float, ...]]
    advice: str
    where: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleReport:
    """What ``analyze`` found of a training step. Nothing was changed.

    tensors: every float tensor, but those that only move another's elements, in graph order.
    visits, listings: lines of the model's source, and their text. findings: on depth. unknown:
    operators without a prediction → how often. notes: what a reader should know besides. block: one
    block with these sizes on its edges, of a step; None where none is there several times.
    """

    model: str
    tensors: tuple[TensorScale, ...]
    visits: tuple[Visit, ...] = ()
    listings: tuple[Listing, ...] = ()
    findings: tuple[Finding, ...] = ()
    unknown: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict[str, int]())
    notes: tuple[str, ...] = ()
    block: Block | None = None

    def of_phase(self, phase: Phase) -> tuple[TensorScale, ...]:
        """The tensors of one phase."""
        return tuple(tensor for tensor in self.tensors if tensor.phase == phase)

    def near_one(
        self, within: Literal["forward", "backward"], factor: float = 8.0
    ) -> float | None:
        """The share of what products of a pass read, saved values and weights included, with RMS in
        [1/factor, factor]; None where there are none."""
        read = [t for t in self.tensors if within in t.read_in]
        good = [t for t in read if 1 / factor <= t.rms <= factor]
        return len(good) / len(read) if read else None

    def predicted_within(self, phase: Phase, factor: float = 2.0) -> float | None:
        """The share of tensors of a phase whose RMS was predicted to within ``factor``, among those
        with a prediction; None where there are none."""
        ratios = [t.ratio for t in self.of_phase(phase) if t.ratio is not None]
        good = [r for r in ratios if 1 / factor <= r <= factor]
        return len(good) / len(ratios) if ratios else None

    def lost(self) -> dict[str, tuple[int, int]]:
        """Format → how many tensors of the two passes would underflow in it, and overflow; one NaN
        or Inf is an overflow."""
        seen = [t for t in self.tensors if t.phase in ("forward", "backward")]
        return {name: (sum(t.underflow.get(name, 0) > LOST for t in seen),
                       sum(t.overflow.get(name, 0) > LOST or t.nonfinite > 0 for t in seen))
                for name in FORMATS}

    def annotated_source(self) -> str:
        """The model's source, each line with the RMS of what it makes: ``(→ 1.0, ← 0.236)``.

        →: the last float value that the line makes; ←: the loss's gradient with respect to it. A
        line that runs in several modules shows the first and the last: ``→ 1.0 … 2.4``.
        """
        from scaleprop.report.listing import annotated

        return annotated(self.visits, self.listings)

    def show(self, console: Console | None = None) -> None:
        """Print a summary, the findings, and a table of every tensor.

        Raises:
            BackendUnavailable: without rich.
        """
        from scaleprop.report.scales_table import show

        show(self, console)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path``: ``.html`` (one offline file) or ``.json`` (schema: this module).

        Raises:
            ConfigError: on another suffix, or where the path cannot be written.
        """
        from scaleprop.report.scales_html import render

        write_report(path, lambda: render(self), self.to_dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; see the schema in this module's docstring."""
        data = dataclasses.asdict(dataclasses.replace(self, block=None))
        del data["block"]
        if self.block is not None:
            data["block"] = self.block.to_dict()
        for tensor in data["tensors"]:
            tensor["exponents"] = sorted([e, n] for e, n in tensor["exponents"].items())
        plain = _plain(data)
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScaleReport:
        """The report that ``to_dict`` wrote.

        Raises:
            ConfigError: on another schema or version, or on unknown or missing keys.
        """
        if data.get("schema") != SCHEMA or data.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"schema {data.get('schema')!r} version {data.get('schema_version')!r}; "
                f"this version reads {SCHEMA!r} version {SCHEMA_VERSION}")
        if (found := problem(data, part_schema("ScaleReport"))) is not None:
            raise ConfigError(f"not a report: {found}")
        fields = {k: v for k, v in data.items() if k not in ("schema", "schema_version")}
        try:
            fields["tensors"] = tuple(_tensor(item) for item in fields["tensors"])
            fields["visits"] = tuple(Visit(**_numbers(item)) for item in fields["visits"])
            fields["listings"] = tuple(_listing(item) for item in fields["listings"])
            fields["findings"] = tuple(_finding(item) for item in fields["findings"])
            fields["notes"] = tuple(fields["notes"])
            if "block" in fields:
                fields["block"] = Block.from_dict(fields["block"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a report: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScaleReport:
        """The report that ``save("x.json")`` wrote.

        Raises:
            ConfigError: where the file cannot be read or is not a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read the report {os.fspath(path)!r}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{os.fspath(path)!r} is not a report: expected a JSON object")
        try:
            return cls.from_dict(cast(dict[str, Any], data))
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)!r}: {error}") from error


def _plain(value: Any) -> Any:
    """Tuples as lists; numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    return value


_FIGURES = ("amax", "rms", "mean", "kurtosis", "predicted", "forward", "backward")


def _numbers(item: Mapping[str, Any]) -> dict[str, Any]:
    """Figures that were written as ``"inf"`` or ``"nan"`` are numbers again."""
    return {key: float(value) if key in _FIGURES and value is not None else value
            for key, value in item.items()}


def _tensor(item: Mapping[str, Any]) -> TensorScale:
    fields = _numbers(item)
    fields["shape"], fields["read_in"] = tuple(fields["shape"]), tuple(fields["read_in"])
    fields["exponents"] = {int(e): int(n) for e, n in fields["exponents"]}
    return TensorScale(**fields)


def _listing(item: Mapping[str, Any]) -> Listing:
    fields = dict(item)
    fields["lines"] = tuple(fields["lines"])
    return Listing(**fields)


def _finding(item: Mapping[str, Any]) -> Finding:
    fields = dict(item)
    fields["figures"] = {key: tuple(map(float, values)) for key, values in item["figures"].items()}
    fields["where"] = tuple(fields["where"])
    return Finding(**fields)
