"""Each example of the page on troubleshooting raises its error, with the message it shows."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from docs.generate.errors import TROUBLES, leaves
from scaleprop.errors import ScalePropError


def pattern(says: str) -> str:
    """``says`` as a regular expression; an ellipsis is anything."""
    return ".*".join(map(re.escape, says.split("…")))


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_examples_raise_what_they_show(
    kind: type[ScalePropError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trouble = TROUBLES[kind]
    page = types.ModuleType("trouble")
    monkeypatch.setitem(sys.modules, "trouble", page)
    monkeypatch.setitem(sys.modules, "tensorboard", sys.modules.get("tensorboard"))  # put back
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)  # or what another test imported would be found
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScalePropError) as raised:
        exec(compile(trouble.example, "trouble.py", "exec"), page.__dict__)
    assert type(raised.value) is kind
    assert re.fullmatch(pattern(trouble.says), str(raised.value), re.S), str(raised.value)
