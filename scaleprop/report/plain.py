"""Records as plain data for JSON, and back.

JSON has no infinities: numbers that are not finite are written as ``"inf"``, ``"-inf"``, ``"nan"``.
Histograms are ``{"first": e, "counts": [n, …]}``: counts of exponent e, e + 1, …
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from scaleprop.report.records import (
    ScaleProvenance,
    TensorRecord,
    TransformRecord,
    TrialRecord,
    Values,
    Variant,
)

Plain = Mapping[str, Any]

_HISTOGRAMS = ("exponents", "scaled")
_NUMBERS = frozenset(("sqnr_db", "saturated", "underflowed", "amax", "rms", "mean", "kurtosis",
                      "predicted", "error", "local_error", "size_ratio", "speed"))
_FIGURES = ("before", "after", "fidelity")  # mappings of measures to numbers


def plain(value: Any) -> Any:
    """Tuples as lists; numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast(Plain, value).items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in cast(Sequence[Any], value)]
    return value


def record_to_plain(record: TensorRecord) -> dict[str, Any]:
    """One record; ``values`` and ``provenance`` are left out where they are not known."""
    fields = dataclasses.asdict(record)
    for name in ("values", "provenance"):
        if fields[name] is None:
            del fields[name]
    if record.values is not None:
        for name in _HISTOGRAMS:
            fields["values"][name] = _histogram_to_plain(fields["values"][name])
    return plain(fields)


def record_from_plain(item: Plain) -> TensorRecord:
    """The record that ``record_to_plain`` wrote."""
    fields = _fields(item)
    if fields.get("values") is not None:
        values = _fields(fields["values"])
        values.update({name: _histogram(values[name]) for name in _HISTOGRAMS})
        if values["scales"] is not None:
            values["scales"] = tuple(map(float, values["scales"]))
        fields["values"] = Values(**values)
    if fields.get("provenance") is not None:
        fields["provenance"] = ScaleProvenance(**_fields(fields["provenance"]))
    return TensorRecord(**fields)


def transforms_from(items: Iterable[Plain]) -> tuple[TransformRecord, ...]:
    """The records that ``plain(dataclasses.asdict(record))`` made."""
    return tuple(TransformRecord(**_fields(item)) for item in items)


def trials_from(items: Iterable[Plain]) -> tuple[TrialRecord, ...]:
    """The same of trials."""
    return tuple(TrialRecord(**_fields(item)) for item in items)


def variants_from(items: Iterable[Plain]) -> tuple[Variant, ...]:
    """The same of variants."""
    return tuple(Variant(**_fields(item)) for item in items)


def _fields(item: Plain) -> dict[str, Any]:
    """Lists as tuples; what stands for a number that is not finite as that number."""
    return {key: _field(key, value) for key, value in item.items()}


def _field(key: str, value: Any) -> Any:
    if key in _FIGURES:
        return {name: float(figure) for name, figure in value.items()}
    if key in _NUMBERS and value is not None:
        return float(value)
    return tuple(cast(list[Any], value)) if isinstance(value, list) else value


def _histogram_to_plain(counts: Mapping[int, int]) -> dict[str, Any]:
    if not counts:
        return {"first": 0, "counts": []}
    first = min(counts)
    return {"first": first, "counts": [counts.get(e, 0) for e in range(first, max(counts) + 1)]}


def _histogram(item: Plain) -> dict[int, int]:
    return {item["first"] + index: count for index, count in enumerate(item["counts"]) if count}
