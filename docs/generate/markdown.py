"""What generated pages are written with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PIPE = re.compile(r"`[^`]*`|\|")  # code stays as it is: the site's Markdown sees no cells in it


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """A Markdown table; columns named in ``numbers`` are aligned right."""
    rule = ["---:" if name in numbers else "---" for name in header]
    lines = [list(header), rule, *([_PIPE.sub(_escaped, cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(found: re.Match[str]) -> str:
    return "\\|" if found[0] == "|" else found[0]


def code(text: str) -> str:
    """``text`` as inline code; nothing for an empty text."""
    return f"`{text}`" if text else ""


def page(title: str, *parts: str) -> str:
    """A page from its title and parts, with an empty line between them."""
    return "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"
