"""The heap does not grow for large blocks, and a C library without such a bound is no error."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from scaleprop import memory

# The first tensor, freed, raises the bound. Each large one is followed by one that stays.
GROWN = """
import re
from scaleprop import memory
import torch

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10

torch.ones(16 << 20, dtype=torch.uint8)
with memory.returned():
    before = resident()
    large, kept = [], []
    for _ in range(64):
        large.append(torch.ones(1 << 20, dtype=torch.uint8))
        kept.append(torch.ones(1 << 16, dtype=torch.uint8))
    peak = resident()
    large.clear()
    print(peak - before, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no such bound")
def test_what_stays_does_not_hold_what_is_freed() -> None:
    """MiB that 68 MiB take, and that are left of them when 64 are freed."""
    run = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True)
    peak, left = map(int, run.stdout.split())
    assert peak > 60 and left < 16


def test_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
    with memory.returned():
        done = True
    assert done
