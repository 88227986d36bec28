"""Put the last demo's table into the README: ``make readme``."""

from __future__ import annotations

import re
from pathlib import Path

START, END = "<!-- demo-table -->", "<!-- /demo-table -->"


def refresh(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its markers.

    Raises:
        ValueError: where there is not exactly one pair of markers.
    """
    block = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(readme)) != 1:
        raise ValueError(f"expected one block {START} … {END}")
    return block.sub(lambda _: f"{START}\n{table.strip()}\n{END}", readme)


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(refresh(path.read_text(), Path("demo/table.md").read_text()))
    print(f"wrote {path}")
