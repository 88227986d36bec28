"""Colours of element formats: of middle lightness, at least 3:1 against white and near black."""

from __future__ import annotations

import re

from scaleprop.report.graph.model import element_of

_INTEGERS = {8: "#2f81d8", 4: "#9a6be0"}
_FLOATS = {"e4m3": "#c9720a", "e5m2": "#d9534f", "e2m1": "#2b9348", "e5m10": "#6f7d95",
           "bf16": "#6f7d95", "f16": "#6f7d95"}
_INTEGER, _FLOAT = "#1591a3", "#c24c96"  # of other widths; other floats and codebooks


def colour_of(format_name: str) -> str:
    """The colour of a format's element, as ``#rrggbb``."""
    element = element_of(format_name)
    integer = re.match(r"u?int(\d+)", element)
    if integer:
        return _INTEGERS.get(int(integer[1]), _INTEGER)
    return next((colour for name, colour in _FLOATS.items() if element.startswith(name)), _FLOAT)
