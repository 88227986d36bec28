"""A griffe extension: docstrings that say ``name: what it is``, line by line, as lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LINE = re.compile(r"(\*{0,2}[a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
_CODE = re.compile(r"``(.+?)``", re.S)


def listed(text: str) -> str:
    """``text`` with a list in place of each run of lines that describe names."""
    lines: list[str] = []
    inside = False
    section = False
    for line in text.splitlines():
        section = bool(re.match(r"(Args|Raises|Returns|Yields|Example):$", line)) or (
            section and (line.startswith(" ") or not line))
        found = None if section else _LINE.fullmatch(line)
        if found:
            if not inside and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines.append(f"- {names}: {found[2]}")
            inside = True
        else:
            if inside and line and not line.startswith(" "):
                lines[-1] += f" {line}"  # the description goes on
                continue
            inside = inside and line.startswith(" ")
            lines.append(line)
    return _CODE.sub(r"`\1`", "\n".join(lines))


class Fields(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)
