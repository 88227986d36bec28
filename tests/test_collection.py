"""Every test file is collected: a setting that skips a folder would look green."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_test_file_is_collected(request: pytest.FixtureRequest):
    config = request.config
    chosen = {(ROOT / argument).resolve() for argument in config.args}
    if chosen != {(ROOT / path).resolve() for path in config.getini("testpaths")} \
            or config.getoption("keyword") or config.getoption("markexpr"):
        pytest.skip("some tests were chosen")
    files = set((ROOT / "tests").rglob("test_*.py"))
    missing = files - {item.path for item in request.session.items}
    assert files and not missing
