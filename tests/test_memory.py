"""Large blocks have pages of their own, and what libraries lack is no error."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaleprop import memory

MIB = 1 << 20
has_mallopt = hasattr(ctypes.CDLL(None), "mallopt")


def resident() -> int:
    """Bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not has_mallopt, reason="the C library has no mallopt")
def test_what_stays_does_not_hold_what_is_freed() -> None:
    """A smaller block after each large one: on a heap, no large one but the last could be returned.

    The first, of 16 MiB, raises the bound: without ``returned``, this fails.
    """
    torch.ones(16 * MIB, dtype=torch.uint8)
    with memory.returned():
        before = resident()
        large, kept = [], []
        for _ in range(64):
            large.append(torch.ones(MIB, dtype=torch.uint8))
            kept.append(torch.ones(MIB // 16, dtype=torch.uint8))
        assert resident() - before > 64 * MIB
        large.clear()
        assert resident() - before < 16 * MIB
    assert len(kept) == 64


def test_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
    with memory.returned():
        done = True
    assert done
