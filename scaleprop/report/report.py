"""The report: what happened to every tensor, as a table, as one HTML file, and as JSON.

JSON, version 2 (``Report.save("x.json")``, ``to_dict``): ``assets/report.schema.json`` is its JSON
Schema, and says what each field is; version 1, which had fewer, is read too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaleprop.errors import ConfigError
from scaleprop.report.files import write_report
from scaleprop.report.graph.model import Block
from scaleprop.report.outliers import OutlierTable
from scaleprop.report.plain import (
    plain,
    record_from_plain,
    record_to_plain,
    transforms_from,
    trials_from,
    variants_from,
)
from scaleprop.report.ranges import ranges_of
from scaleprop.report.records import TensorRecord, TransformRecord, TrialRecord, Variant
from scaleprop.report.scales import ScaleReport
from scaleprop.report.schema import problem

if TYPE_CHECKING:
    from rich.console import Console

    from scaleprop.report.diff import ReportDifference

SCHEMA = "scaleprop.report"
SCHEMA_VERSION = 2
READ = (1, 2)  # versions that are read: 2 has only more keys


def _no_numbers() -> dict[str, float]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a compilation or an analysis did, tensor by tensor.

    recipe, backend: their names; None for an analysis.
    records: one per operand of each operator, in graph order.
    notes: what a reader should know besides, one sentence each.
    nbytes_before, nbytes_after: bytes of the model's parameters and buffers.
    fidelity: measure → number against the model that was given; empty unless verified.
    outliers: of an analysis: what stands out in activations, weights and attention.
    transforms: of channels, applied or refused. trials: chains that were tried, and what they gave.
    scales: how large values are through depth, forward, and backward where a loss was given.
    block: a picture of one block, of a compiled model; None where none is there several times.
    variants: what several recipes made of the model, side by side.
    measure: fills in what only a run of the model tells, see ``measured``; None where it is there.
    """

    recipe: str | None = None
    backend: str | None = None
    records: tuple[TensorRecord, ...] = ()
    notes: tuple[str, ...] = ()
    nbytes_before: int | None = None
    nbytes_after: int | None = None
    fidelity: Mapping[str, float] = dataclasses.field(default_factory=_no_numbers)
    outliers: OutlierTable | None = None
    transforms: tuple[TransformRecord, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    scales: ScaleReport | None = None
    block: Block | None = None
    variants: tuple[Variant, ...] = ()
    measure: Callable[[Report], Report] | None = dataclasses.field(
        default=None, repr=False, compare=False)

    def measured(self) -> Report:
        """This report with ``values``, what rounding lost in activations, the effects of
        transforms, ``scales`` and ``block``: of a compiled model, they are measured on its example
        inputs when they are first asked for. ``save`` and ``to_dict`` ask; ``show`` shows what is
        there.
        """
        return self if self.measure is None else self.measure(self)

    @property
    def quantized(self) -> tuple[TensorRecord, ...]:
        """The records of tensors that got a format."""
        return tuple(record for record in self.records if record.format is not None)

    @property
    def high(self) -> tuple[TensorRecord, ...]:
        """The records of tensors that stayed in high precision."""
        return tuple(record for record in self.records if record.format is None)

    @property
    def size_ratio(self) -> float | None:
        """Bytes after ÷ bytes before; None where either is unknown."""
        if not self.nbytes_before or self.nbytes_after is None:
            return None
        return self.nbytes_after / self.nbytes_before

    @property
    def tally(self) -> str:
        """How many tensors got a format; for an analysis, how many were compared in how many."""
        if self.recipe is not None:
            return f"{len(self.quantized)} of {len(self.records)}"
        tensors = {(record.node, record.operand) for record in self.records}
        return f"{len(tensors)} in {len({record.format for record in self.records})} formats"

    def reasons(self) -> list[tuple[str, str, int]]:
        """Why tensors stayed high: (operator, reason, how many), most frequent first."""
        counts = Counter((record.op, record.reason or "no reason given") for record in self.high)
        return [(op, reason, count) for (op, reason), count in counts.most_common()]

    def with_variants(self, variants: Iterable[Variant]) -> Report:
        """This report with what several recipes made of the model: ``compare_recipes`` has them."""
        return dataclasses.replace(self, variants=tuple(variants))

    def with_scales(self, scales: ScaleReport) -> Report:
        """This report with other values through depth: forward and backward, of ``analyze`` with a
        loss."""
        return dataclasses.replace(self, scales=scales)

    def diff(self, other: Report, threshold: float = 0.0) -> ReportDifference:
        """What ``other`` has otherwise, tensor by tensor, both measured: see ``report.diff``.

        Raises:
            ConfigError: for a threshold that is no number of decibels from 0.
        """
        from scaleprop.report.diff import compare

        return compare(self.measured(), other.measured(), threshold)

    def show(self, console: Console | None = None) -> None:
        """Print a summary and a table of every tensor.

        Raises:
            BackendUnavailable: without rich.
        """
        from scaleprop.report.table import show

        show(self, console)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path``: ``.html`` (one offline file) or ``.json`` (schema: this module).

        Raises:
            ConfigError: on another suffix, or where the path cannot be written.
        """
        from scaleprop.report.html import render

        write_report(path, lambda: render(self.measured()), self.to_dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, measured; see the schema in this module's docstring."""
        self = self.measured()
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe,
            "backend": self.backend,
            "nbytes_before": self.nbytes_before,
            "nbytes_after": self.nbytes_after,
            "fidelity": plain({key: float(value) for key, value in self.fidelity.items()}),
            "notes": list(self.notes),
            "formats": {name: plain(dataclasses.asdict(range_))
                        for name, range_ in ranges_of(self.records).items()},
            "records": [record_to_plain(record) for record in self.records],
            **{name: part.to_dict()
               for name, part in (("outliers", self.outliers), ("scales", self.scales),
                                  ("block", self.block))
               if part is not None},
            **{name: [plain(dataclasses.asdict(item)) for item in items]
               for name, items in (("transforms", self.transforms), ("trials", self.trials),
                                   ("variants", self.variants)) if items},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` wrote.

        Raises:
            ConfigError: on another schema or version, or on unknown or missing keys.
        """
        if data.get("schema") != SCHEMA or data.get("schema_version") not in READ:
            raise ConfigError(
                f"schema {data.get('schema')!r} version {data.get('schema_version')!r}; "
                f"this version reads {SCHEMA!r} versions {', '.join(map(str, READ))}"
            )
        if (found := problem(data)) is not None:
            raise ConfigError(f"not a report: {found}")
        # formats say what a reader without this library needs: here their names do
        fields = {k: v for k, v in data.items() if k not in ("schema", "schema_version", "formats")}
        try:
            fields["fidelity"] = {key: float(value) for key, value in fields["fidelity"].items()}
            fields["notes"] = tuple(fields["notes"])
            fields["records"] = tuple(map(record_from_plain, fields["records"]))
            fields["transforms"] = transforms_from(fields.get("transforms", []))
            fields["trials"] = trials_from(fields.get("trials", []))
            fields["variants"] = variants_from(fields.get("variants", []))
            if "outliers" in fields:
                fields["outliers"] = OutlierTable.from_dict(fields["outliers"])
            if "scales" in fields:
                fields["scales"] = ScaleReport.from_dict(fields["scales"])
            if "block" in fields:
                fields["block"] = Block.from_dict(fields["block"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a report: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
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
