"""The documents' Python runs as it stands, and the README's demo block can be refreshed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.readme_table import END, START, refresh

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (document, number, code)
    for document in ("README.md", "CONTRIBUTING.md")
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    )
]
# Each block in a process of its own, forked from one that has imported what all of them import.
FORKS = """
import json, os, sys, traceback
import scaleprop
for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        sys.path[0] = ""
        try:
            exec(compile(code, "block", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run_block() -> Iterator[Callable[[str, Path], int]]:
    """The status with which a block ends in a folder; what it says is in the file ``said``."""
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin and forks.stdout

        def run(code: str, folder: Path) -> int:
            print(json.dumps([code, str(folder)]), file=forks.stdin, flush=True)
            return int(forks.stdout.readline())

        yield run
        forks.stdin.close()


@pytest.mark.parametrize(
    ("document", "number", "code"), BLOCKS, ids=[f"{name}-{number}" for name, number, _ in BLOCKS]
)
def test_python_blocks_run(
    document: str, number: int, code: str, tmp_path: Path, run_block: Callable[[str, Path], int]
) -> None:
    status = run_block(code, tmp_path)
    assert status == 0, f"{document}, block {number}:\n{(tmp_path / 'said').read_text()}"


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
