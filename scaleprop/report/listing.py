"""A model's source, each line with the size of the value and of the gradient that it makes."""

from __future__ import annotations

from collections.abc import Sequence

from scaleprop.report.scales import Listing, Visit

_COLUMN = 72  # where annotations begin, beyond lines that are shorter
_ALIKE = 1.05  # sizes closer than this are shown once


def annotated(visits: Sequence[Visit], listings: Sequence[Listing]) -> str:
    """Every listing, under its file's name, with what is known of its lines."""
    by_line: dict[tuple[str, int], list[Visit]] = {}
    for visit in visits:
        by_line.setdefault((visit.file, visit.line), []).append(visit)
    blocks: list[str] = []
    previous = None
    for listing in listings:
        head = [f"# {listing.file}"] if listing.file != previous else []
        previous = listing.file
        body = [_line(number, text, by_line.get((listing.file, number), []))
                for number, text in enumerate(listing.lines, listing.first)]
        blocks.append("\n".join([*head, *body]))
    return "\n\n".join(blocks) + "\n" if blocks else ""


def _line(number: int, text: str, found: Sequence[Visit]) -> str:
    plain = f"{number:5}  {text}"
    return f"{plain:<{_COLUMN}}  {annotation(found)}" if found else plain


def annotation(found: Sequence[Visit]) -> str:
    """``(→ 1.0, ← 0.236)``; first and last where a line runs several times."""
    gradients = [visit.backward for visit in found if visit.backward is not None]
    forward = _span([visit.forward for visit in found])
    return f"(→ {forward}, ← {_span(gradients)})" if gradients else f"(→ {forward})"


def _span(values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    small, large = min(values), max(values)
    return size(first) if large <= small * _ALIKE else f"{size(first)} … {size(last)}"


def size(value: float) -> str:
    """Three digits: ``1.0``, ``0.236``, ``2.4e-05``."""
    text = f"{value:.3g}"
    return text if any(mark in text for mark in ".en") else f"{text}.0"
