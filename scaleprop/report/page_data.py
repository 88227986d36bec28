"""What the scripts of a page draw from: tensors as columns, as few bytes as it takes.

A column is a list with one entry per tensor, or ``{"of": [value, …], "at": [place, …]}`` where
values repeat; a column of nothing is left out. Numbers have four digits; JSON has no infinities,
so that ``"Infinity"``, ``"-Infinity"`` and ``"NaN"`` stand for numbers. A histogram is
``[e, n, …]``: parts per 100 000 of exponents e, e + 1, …; what is not nothing has at least one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaleprop.formats.elements import FloatElement, element
from scaleprop.report import text
from scaleprop.report.ranges import ranges_of
from scaleprop.report.records import TensorRecord
from scaleprop.report.scales import FORMATS, ScaleReport, TensorScale

_PARTS = 100_000
Item = dict[str, Any]


def columns(items: Sequence[Item]) -> dict[str, Any]:
    """Rows as columns: see the module."""
    names = dict.fromkeys(name for item in items for name in item)
    found: dict[str, Any] = {}
    for name in names:
        values = [item.get(name) for item in items]
        if any(value not in (None, "", []) for value in values):
            found[name] = _column(values)
    return found


def _column(values: list[Any]) -> Any:
    places: dict[str, int] = {}
    at = [places.setdefault(json.dumps(value), len(places)) for value in values]
    if len(places) > 0.7 * len(values):
        return values
    distinct: list[Any] = [None] * len(places)
    for value, place in zip(values, at, strict=True):
        distinct[place] = value
    return {"of": distinct, "at": at}


def short(value: float | None) -> float | str | None:
    """Four digits; a whole number without a point."""
    if value is None:
        return None
    if not math.isfinite(value):
        return str(value).replace("inf", "Infinity").replace("nan", "NaN")
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def histogram(counts: Mapping[int, int]) -> list[int]:
    """``{e: n}`` as ``[e, parts, …]``."""
    total = sum(counts.values())
    if not total:
        return []
    first = min(counts)
    parts = [counts.get(e, 0) * _PARTS / total for e in range(first, max(counts) + 1)]
    return [first, *(max(1, round(part)) if part else 0 for part in parts)]


def record_item(record: TensorRecord) -> Item:
    """What the page knows of one operand."""
    item: Item = {
        "node": record.node, "op": record.op, "operand": record.operand, "role": record.role,
        "module": record.module, "shape": text.shape(record), "format": record.format,
        "kind": record.scale_kind, "by": record.decided_by, "reason": record.reason,
        "lowering": record.lowering, "source": text.place(record),
        "sqnr": short(record.sqnr_db), "saturated": short(record.saturated),
        "underflowed": short(record.underflowed), "bytes": record.nbytes,
        "before": record.nbytes_high,
    }
    values, origin = record.values, record.provenance
    if values is not None:
        low, high = values.scales or (None, None)
        item |= {
            "count": values.count, "amax": short(values.amax), "rms": short(values.rms),
            "mean": short(values.mean), "kurtosis": short(values.kurtosis),
            "zeros": short(values.zeros), "nonfinite": short(values.nonfinite),
            "predicted": short(values.predicted), "exponents": histogram(values.exponents),
            "scaled": histogram(values.scaled), "low": short(low), "high": short(high)}
    if origin is not None:
        item |= {"pass": origin.by, "statistic": origin.statistic, "batches": origin.batches,
                 "value": origin.value, "neighbours": list(origin.neighbours)}
    return item


def scale_item(tensor: TensorScale) -> Item:
    """What the page knows of one value of a step."""
    return {
        "node": tensor.node, "op": tensor.op, "phase": tensor.phase, "name": tensor.name,
        "module": tensor.module, "shape": "×".join(map(str, tensor.shape)) or "scalar",
        "source": text.short_place(tensor.source), "count": tensor.count,
        "amax": short(tensor.amax), "rms": short(tensor.rms), "mean": short(tensor.mean),
        "kurtosis": short(tensor.kurtosis), "zeros": short(tensor.zeros),
        "nonfinite": short(tensor.nonfinite), "predicted": short(tensor.predicted),
        "exponents": histogram(tensor.exponents), "flags": list(tensor.flags)}


def report_data(
    records: Sequence[TensorRecord], slugs: Sequence[str], scales: ScaleReport | None
) -> dict[str, Any]:
    """The data of a report's page: operands first, as many as the table has rows; then values of
    ``scales``, each with the operand that it is (``record``) where there is one."""
    items = [record_item(record) for record in records]
    of_name: dict[str, int] = {}
    for index, record in enumerate(records):
        of_name.setdefault(record.operand, index)
    taken = set(slugs)
    names = list(slugs)
    for tensor in scales.tensors if scales is not None else ():
        item = scale_item(tensor)
        record = of_name.get(tensor.name if tensor.phase == "parameter" else tensor.node)
        if record is not None and tensor.phase != "backward":
            item["record"] = record
        items.append(item)
        names.append(unique(tensor.node, taken))
    found = {"rows": len(records), "ids": names, "tensors": columns(items),
             "formats": _formats(records), "plain": plain_formats()}
    return {**found, "depth": _depth(items, len(records))}


def scales_data(tensors: Sequence[TensorScale], slugs: Sequence[str]) -> dict[str, Any]:
    """The data of a scale report's page: one item per row of its table."""
    items = [scale_item(tensor) for tensor in tensors]
    return {"rows": len(items), "ids": list(slugs), "tensors": columns(items), "formats": {},
            "plain": plain_formats(), "depth": _depth(items, 0)}


def slugs_of(names: Iterable[str]) -> list[str]:
    """A fragment for each name, all different."""
    taken: set[str] = set()
    return [unique(name, taken) for name in names]


def unique(name: str, taken: set[str]) -> str:
    """``name`` without spaces, numbered where it is in ``taken``; adds it there."""
    stem = found = "_".join(name.split()) or "_"
    number = 1
    while found in taken:
        number += 1
        found = f"{stem}~{number}"
    taken.add(found)
    return found


def _formats(records: Iterable[TensorRecord]) -> dict[str, list[Any]]:
    """Format → [smallest, smallest normal, largest, bits of an element, its name, block, scale]."""
    return {name: [fmt.min_subnormal, fmt.min_normal, fmt.max, fmt.bits, fmt.element,
                   "×".join(map(str, fmt.block or ())), fmt.scale]
            for name, fmt in ranges_of(records).items()}


def plain_formats() -> dict[str, list[Any]]:
    """The same of elements without a scale."""
    found: dict[str, list[Any]] = {}
    for name in FORMATS:
        fmt = element(name)
        assert isinstance(fmt, FloatElement)
        found[name] = [fmt.smallest, math.ldexp(1.0, fmt.emin), fmt.max, fmt.bits, name, "", ""]
    return found


def _depth(items: Sequence[Item], records: int) -> list[dict[str, Any]]:
    """What the charts of depth show, in order: a heading and the places of its tensors."""
    values = range(records, len(items))
    forward = [i for i in values if items[i]["phase"] in ("forward", "input")]
    weights = _distinct(items, [i for i in range(records) if items[i]["kind"] == "weight"])
    parts = (
        ("Forward: activations", forward or _distinct(
            items, [i for i in range(records) if items[i]["kind"] != "weight"
                    and items[i]["role"] not in ("fprop.w", "bias", "embedding")])),
        ("Backward: gradients", [i for i in values if items[i]["phase"] == "backward"]),
        ("Weights", weights or [i for i in values if items[i]["phase"] == "parameter"]),
    )
    return [{"title": title, "items": places} for title, places in parts if len(places) > 1]


def _distinct(items: Sequence[Item], places: Iterable[int]) -> list[int]:
    """Each measured operand once; of an analysis, in its first format."""
    found: dict[str, int] = {}
    for i in places:
        if items[i].get("rms") is not None or items[i]["sqnr"] is not None:
            found.setdefault(items[i]["operand"], i)
    return list(found.values())
