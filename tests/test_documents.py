"""The documents' Python runs as it stands, and the README's demo block can be refreshed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.readme_table import END, START, refresh

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (document, number, code)
    for document in ("README.md", "CONTRIBUTING.md")
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    )
]


@pytest.mark.parametrize(
    ("document", "number", "code"), BLOCKS, ids=[f"{name}-{number}" for name, number, _ in BLOCKS]
)
def test_python_blocks_run(document: str, number: int, code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, f"{document}, block {number}:\n{done.stderr}"


def test_the_readme_starts_with_code() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 35


def test_the_demo_block_is_refreshed_in_place() -> None:
    readme = (ROOT / "README.md").read_text()
    changed = refresh(readme, "| a |\n| --- |\n| 1\\0 |\n")
    assert f"{START}\n| a |\n| --- |\n| 1\\0 |\n{END}" in changed
    assert refresh(changed, "x") == refresh(readme, "x")
    before, after = readme.split(START)[0], readme.split(END)[1]
    assert changed.startswith(before)
    assert changed.endswith(after)


@pytest.mark.parametrize("readme", ["", f"{START}{END}{START}{END}", END + START])
def test_a_missing_demo_block_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="expected one block"):
        refresh(readme, "table")
