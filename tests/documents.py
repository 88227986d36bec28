"""Code blocks of the documents, and what their pages say about running them.

Blocks of a page under docs/ run in order, in one module of their own; those of the README and of
CONTRIBUTING stand alone. Comments of a page, which readers do not see, say the rest:

    <!-- run …code… -->                      runs where it stands: what the page takes for granted
    <!-- shorter: this => that -->           the next block runs with this replaced by that
    <!-- not run: why -->                    the next block is only parsed

What a ```text block right after code says is what the code prints; numbers may differ by 2 %.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md",
         *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(
    r"(?P<notes>(?:^ *<!-- (?:shorter|not run): .*? -->\n)*)"
    r"(?:^<!-- run\n(?P<hidden>.*?)^-->"
    r"|^(?P<indent> *)```python\n(?P<shown>.*?)^(?P=indent)```"
    r"(?:\n\n```text\n(?P<says>.*?)^```)?)", re.M | re.S)
_NUMBER = re.compile(r"[+-]?\d+\.?\d*(?:e[+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    """Python of a page. says: what it prints, or None; runs: whether it is more than parsed."""

    line: int
    code: str
    says: str | None
    runs: bool


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: where a note is about nothing, or a block was not understood.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    found = 0
    for match in _BLOCK.finditer(text):
        code = match["hidden"] or textwrap.dedent(match["shown"])
        found += match["hidden"] is None
        for old, new in re.findall(r"<!-- shorter: (.*?) => (.*?) -->", match["notes"]):
            if old not in code:
                raise ValueError(f"{page}: {old!r} is not in the block that is to be shorter")
            code = code.replace(old, new)
        yield Block(text[:match.start()].count("\n") + 1, code, match["says"],
                    "not run:" not in match["notes"])
    if found != len(re.findall(r"^ *```python", text, re.M)):
        raise ValueError(f"{page}: {found} blocks of Python were found, but it has others")


def same(printed: str, said: str) -> bool:
    """Whether both say the same, numbers within 2 %."""
    if _NUMBER.sub("#", printed.strip()) != _NUMBER.sub("#", said.strip()):
        return False
    pairs = zip(_NUMBER.findall(printed), _NUMBER.findall(said), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.02) for a, b in pairs)
