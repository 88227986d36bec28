"""What differs between two reports, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from scaleprop.errors import ConfigError
from scaleprop.report import text
from scaleprop.report.plain import plain
from scaleprop.report.records import TensorRecord

if TYPE_CHECKING:
    from rich.console import Console

    from scaleprop.report.report import Report

SCHEMA = "scaleprop.report.diff"
SCHEMA_VERSION = 1
_COMPARED = ("format", "sqnr_db", "nbytes", "decided_by", "reason", "shape", "scale_kind",
             "lowering")  # fmt: skip

Change = Literal["changed", "added", "removed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One operand that differs: fields of its records before and after.

    change: ``added`` and ``removed`` are operands of one report alone: their other side is empty.
    loss_db: SQNR before − after, in decibels; None where either is unknown. fields: those that
    differ, of format, sqnr_db, nbytes, decided_by, reason, shape, scale_kind and lowering; of an
    analysis, ``lowering`` is a phrase of numbers, and is not compared.
    """

    node: str
    operand: str
    module: str
    change: Change
    fields: tuple[str, ...]
    before: TensorRecord | None
    after: TensorRecord | None
    loss_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportDifference:
    """What differs between two reports; empty where nothing does.

    tensors: the greatest loss of SQNR first; then added ones, then removed ones. summary: recipe,
    backend, stored bytes and fidelity that differ: name → (before, after).
    """

    tensors: tuple[TensorDifference, ...]
    summary: tuple[tuple[str, Any, Any], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tensors or self.summary)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "summary": {name: plain([old, new]) for name, old, new in self.summary},
            "tensors": [
                {"node": one.node, "operand": one.operand, "module": one.module,
                 "change": one.change, "fields": list(one.fields), "loss_db": plain(one.loss_db),
                 "before": _compared(one.before), "after": _compared(one.after)}
                for one in self.tensors],
        }

    def show(self, console: Console | None = None) -> None:
        """Print what differs of the whole, and of each tensor.

        Raises:
            BackendUnavailable: without rich.
        """
        from scaleprop.report.diff_table import show

        show(self, console)


def compare(before: Report, after: Report, threshold: float = 0.0) -> ReportDifference:
    """What ``after`` has otherwise than ``before``.

    Tensors are matched by node, operand, module and role, and of an analysis by format as well.
    threshold: changes of SQNR of at most so many decibels are none.

    Raises:
        ConfigError: for a threshold that is no number from 0.
    """
    if not threshold >= 0:
        raise ConfigError(f"threshold={threshold!r}: a number of decibels, at least 0, is needed")
    by_format = before.recipe is None and after.recipe is None
    old, new = (_keyed(report.records, by_format) for report in (before, after))
    found: list[TensorDifference] = []
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        fields = tuple(name for name in _differing(one, other, threshold)
                       if not (by_format and name == "lowering"))
        record = one or other
        if not fields or record is None:
            continue
        change: Change = "added" if one is None else "removed" if other is None else "changed"
        found.append(TensorDifference(
            node=record.node, operand=record.operand, module=record.module, change=change,
            fields=fields, before=one, after=other, loss_db=_loss(one, other)))
    order = {"changed": 0, "added": 1, "removed": 2}
    found.sort(key=lambda one: (order[one.change], -_rank(one.loss_db)))
    return ReportDifference(tensors=tuple(found), summary=_summary(before, after))


def _keyed(
    records: Sequence[TensorRecord], by_format: bool
) -> dict[tuple[Any, ...], TensorRecord]:
    """Records by what they are matched by; of several alike, each has its place among them."""
    found: dict[tuple[Any, ...], TensorRecord] = {}
    for record in records:
        key = (record.node, record.operand, record.module, record.role,
               record.format if by_format else None)
        place = 0
        while (*key, place) in found:
            place += 1
        found[*key, place] = record
    return found


def _differing(
    one: TensorRecord | None, other: TensorRecord | None, threshold: float
) -> tuple[str, ...]:
    if one is None or other is None:
        return _COMPARED
    return tuple(
        name for name in _COMPARED
        if (not _alike(one.sqnr_db, other.sqnr_db, threshold) if name == "sqnr_db"
            else getattr(one, name) != getattr(other, name)))


def _alike(one: float | None, other: float | None, threshold: float) -> bool:
    if one is None or other is None:
        return one is other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= threshold


def _loss(one: TensorRecord | None, other: TensorRecord | None) -> float | None:
    if one is None or other is None or one.sqnr_db is None or other.sqnr_db is None:
        return None
    return 0.0 if one.sqnr_db == other.sqnr_db else one.sqnr_db - other.sqnr_db


def _rank(loss: float | None) -> float:
    """What became NaN lost everything; what is unknown comes after what is known."""
    if loss is None:
        return -math.inf
    return math.inf if math.isnan(loss) else loss


def _summary(before: Report, after: Report) -> tuple[tuple[str, Any, Any], ...]:
    rows = [(name, getattr(before, name), getattr(after, name))
            for name in ("recipe", "backend", "nbytes_before", "nbytes_after")]
    measures = dict.fromkeys((*before.fidelity, *after.fidelity))
    rows += [(name, before.fidelity.get(name), after.fidelity.get(name)) for name in measures]
    return tuple(row for row in rows if plain(row[1]) != plain(row[2]))


def _compared(record: TensorRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {name: plain(getattr(record, name)) for name in _COMPARED}


def shown(record: TensorRecord | None, name: str) -> str:
    """One field of one side, for people."""
    if record is None:
        return "–"
    value = getattr(record, name)
    if name == "shape":
        return text.shape(record)
    if name == "sqnr_db":
        return text.decibels(value)
    if name == "format":
        return value or text.HIGH
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
