"""Every test file is collected: a setting that skips a folder would look green."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_test_file_is_collected(request: pytest.FixtureRequest):
    config = request.config
    if (config.args, config.option.keyword, config.option.markexpr) != (
            config.getini("testpaths"), "", ""):
        pytest.skip("not all tests were asked for")
    files = set((ROOT / "tests").rglob("test_*.py"))
    assert files and not files - {item.path for item in request.session.items}
