"""``examples/train_distributed``: what it prints is what it says."""

from __future__ import annotations

import pytest
import torch

from examples import train_distributed

from .ranks import spawn


def test_processes_train_as_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_distributed.mp, "spawn", spawn)
    torch._dynamo.reset()
    found = train_distributed.main(["--inner", "eager"])
    assert list(found) == ["one process", "DDP, 2 processes", "FSDP2, 2 processes"]
    expected, *others = found.values()
    assert expected[-1] < 0.9 * expected[0]
    for losses in others:  # resumed in FP8: exponents are measured anew
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.01, atol=0)
    assert capsys.readouterr().out.count("\n") == 3
