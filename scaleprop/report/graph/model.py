"""What a picture of a block holds: operators, what they read from each other, and scales."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from scaleprop.errors import ConfigError
from scaleprop.formats.elements import ELEMENTS
from scaleprop.formats.scaled import PLAIN, parse
from scaleprop.report.files import write_text

SCHEMA = "scaleprop.block"
SCHEMA_VERSION = 1
Kind = Literal["operator", "quantize", "dequantize", "parameter", "input", "output", "module"]
_NOT_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is written on an edge, in one direction.

    value: a scale, or the RMS of a value; of several scales their median; None where it is found at
    run time and was not measured. low, high: the least and greatest of several. format: that the
    data are in; "" where they are high.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    format: str = ""

    @property
    def text(self) -> str:
        """``2^-7``, ``2^-9…2^-6`` of several, or the element format where no number is known."""
        if self.value is None:
            return self.element
        ends = [power_of_two(end) for end in (self.low, self.high) if end is not None]
        return "…".join(dict.fromkeys(ends)) or power_of_two(self.value)

    @property
    def element(self) -> str:
        """Format of one element: what ``format`` begins with."""
        return element_of(self.format)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockNode:
    """One box. label: its operator, parameter or neighbour. module: path below the block, or
    whole where it is outside. format: what it makes, "" where that is high. detail: shape, source
    line and what else a tooltip has."""

    name: str
    label: str
    kind: Kind = "operator"
    module: str = ""
    format: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockEdge:
    """One value that a node reads. forward: of the value; backward: of its gradient. detail: the
    exact numbers; why it stayed high, where it did."""

    source: str
    target: str
    forward: Scale | None = None
    backward: Scale | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model as a graph without cycles.

    path: its module's; "" for the whole model. what: its class, and how often there is such a
    block. made: by which recipe, for which backend. meaning: what numbers on edges are. notes: what
    is not drawn.
    """

    path: str
    what: str
    made: str
    meaning: str
    nodes: tuple[BlockNode, ...]
    edges: tuple[BlockEdge, ...]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """``encoder.layer.0: Layer, 1 of 12``."""
        return f"{self.path or 'model'}: {self.what}"

    def svg(self, prefix: str = "block", links: Mapping[str, str] | None = None) -> str:
        """An ``<svg>`` element that stands alone or in a page; see ``render_block``."""
        from scaleprop.report.graph.svg import render_block

        return render_block(self, prefix, links)

    def dot(self) -> str:
        """The block in GraphViz's language."""
        from scaleprop.report.graph.dot import to_dot

        return to_dot(self)

    def save(self, path: str | Path) -> Path:
        """Write ``path``: ``.svg``, or ``.dot`` or ``.gv`` for GraphViz.

        Raises:
            ConfigError: on another suffix, or where the path cannot be written.
        """
        target = Path(path)
        check_suffix(target)
        drawn = self.svg() if target.suffix.lower() == ".svg" else self.dot()
        write_text(target, drawn)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = dataclasses.asdict(self)
        for edge in data["edges"]:
            for scale in (edge["forward"], edge["backward"]):
                for name in ("value", "low", "high") if scale else ():
                    number = scale[name]
                    finite = number is None or math.isfinite(number)
                    scale[name] = number if finite else str(number)
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION,
                **{name: list(item) if isinstance(item, tuple) else item
                   for name, item in data.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Block:
        """The block that ``to_dict`` made plain.

        Raises:
            ConfigError: on another schema or version, or on unknown or missing keys.
        """
        if data.get("schema") != SCHEMA or data.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"schema {data.get('schema')!r} version "
                              f"{data.get('schema_version')!r}; this version reads {SCHEMA!r} "
                              f"version {SCHEMA_VERSION}")
        fields = {k: v for k, v in data.items() if k not in ("schema", "schema_version")}
        try:
            fields["nodes"] = tuple(BlockNode(**item) for item in fields["nodes"])
            fields["edges"] = tuple(
                dataclasses.replace(BlockEdge(**item), forward=_scale(item["forward"]),
                                    backward=_scale(item["backward"])) for item in fields["edges"])
            fields["notes"] = tuple(fields["notes"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a block: {type(error).__name__}: {error}") from error


def _scale(item: Mapping[str, Any] | None) -> Scale | None:
    if item is None:
        return None
    numbers = {name: None if item[name] is None else float(item[name])
               for name in ("value", "low", "high")}
    return Scale(**numbers, format=item["format"])


def element_of(format_name: str) -> str:
    """Name of a format's element: ``int8`` of ``int8[row]*f32``; one without scales is its own."""
    if not format_name or format_name in PLAIN or format_name in ELEMENTS:
        return format_name
    return parse(format_name).element.name


def power_of_two(value: float) -> str:
    """``2^-7`` for a power of two; for other positive numbers the exponent has one decimal."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    sign = "-" if value < 0 else ""
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5:
        return f"{sign}2^{exponent - 1}"
    return f"{sign}2^{round(math.log2(abs(value)), 1) + 0.0:.1f}"


def printable(text: str) -> str:
    """``text`` with characters that no XML may hold written as Python does: ``\\x01``."""
    return _NOT_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_suffix(path: Path) -> None:
    """Raise ``ConfigError`` for a file that ``Block.save`` would not write."""
    if path.suffix.lower() not in (".svg", ".dot", ".gv"):
        raise ConfigError(f"a block is saved as .svg, .dot or .gv, not "
                          f"{path.suffix or 'without a suffix'}: {str(path)!r}")
