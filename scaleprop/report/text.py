"""How a report spells numbers: shared by the table and the HTML page."""

from __future__ import annotations

import math

from scaleprop.report.records import TensorRecord

HIGH = "high"  # shown in place of a format where a tensor stayed in high precision


def decibels(value: float | None) -> str:
    """``31.4``; ``exact`` for an error of zero; empty where not measured."""
    if value is None:
        return ""
    if value == math.inf:
        return "exact"
    return f"{value:.1f}"


def digits(value: float | None) -> str:
    """Three digits: ``1``, ``0.236``, ``2.4e-05``; empty where not measured."""
    return "" if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent: ``0``, ``<0.01`` or two digits; empty where not measured."""
    if share is None:
        return ""
    if share == 0:
        return "0"
    return "<0.01" if share < 1e-4 else f"{100 * share:.2f}"


def megabytes(count: int | None) -> str:
    """Bytes as ``12.3 MB`` (10⁶), ``4.5 kB`` or ``17 B``; ``?`` where unknown."""
    if count is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def shape(record: TensorRecord) -> str:
    """``8×s×384``."""
    return "×".join(str(size) for size in record.shape)


def place(record: TensorRecord) -> str:
    """The user's source line with the last folder only: ``encoder/model.py:99 in forward``."""
    return short_place(record.source)


def short_place(source: str) -> str:
    """The same, of a source line."""
    return "/".join(source.split("/")[-2:])


def outcome(record: TensorRecord) -> str:
    """What runs for a quantized tensor's operator; why not, for one that stayed high."""
    if record.format is None:
        return record.reason or "no reason given"
    return record.lowering or ""
