"""The documents' Python runs as it stands, their commands exist, and the README's demo block can be
refreshed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.readme_table import END, START, refresh
from tests.documents import PAGES, ROOT, Block, blocks, same

STANDALONE = ("README.md", "CONTRIBUTING.md")  # each of their blocks runs by itself
RUNS = [
    (page, found)
    for page in PAGES
    for found in ([[block] for block in blocks(page)] if page in STANDALONE
                  else [list(blocks(page))])
    if found
]
# Each run in a process of its own, forked from one that has imported what all of them import.
FORKS = """
import ast, contextlib, io, json, os, sys, traceback, types
import torch._dynamo, torch.export, scaleprop.api, scaleprop.training
for line in sys.stdin:
    blocks, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        sys.path[0] = ""
        page = sys.modules["document"] = types.ModuleType("document")
        printed = []
        try:
            for line, code, runs in blocks:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    parsed = compile(code, f"block at line {line}", "exec")
                    if runs:
                        exec(parsed, page.__dict__)
                printed.append(out.getvalue())
            json.dump(printed, open("printed", "w"))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run_blocks() -> Iterator[Callable[[list[Block], Path], int]]:
    """The status with which blocks end in a folder; what they say is in the file ``said``, what
    each printed in ``printed``."""
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin and forks.stdout

        def run(found: list[Block], folder: Path) -> int:
            given = [(block.line, block.code, block.runs) for block in found]
            print(json.dumps([given, str(folder)]), file=forks.stdin, flush=True)
            return int(forks.stdout.readline())

        yield run
        forks.stdin.close()


@pytest.mark.parametrize(("page", "found"), RUNS,
                         ids=[f"{page}-{found[0].line}" for page, found in RUNS])
def test_python_blocks_run(
    page: str, found: list[Block], tmp_path: Path, run_blocks: Callable[[list[Block], Path], int]
) -> None:
    status = run_blocks(found, tmp_path)
    assert status == 0, f"{page}:\n{(tmp_path / 'said').read_text()}"
    printed = json.loads((tmp_path / "printed").read_text())
    for block, text in zip(found, printed, strict=True):
        assert block.says is None or same(text, block.says), f"{page}, {block.line}: {text}"


def test_what_a_block_prints_is_compared() -> None:
    assert same("cosine 0.991\n", "cosine 0.990")
    assert not same("cosine 0.90", "cosine 0.99")
    assert not same("cosine 0.99 x", "cosine 0.99")


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
