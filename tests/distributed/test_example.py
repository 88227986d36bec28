"""``examples/train_ddp`` and ``train_fsdp2``: what they print is what they say."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from examples import small_ranks, train_ddp, train_fsdp2

from .ranks import spawn


@pytest.fixture(scope="module")
def alone() -> list[float]:
    torch._dynamo.reset()
    return small_ranks.alone(small_ranks.options("", ["--short"]))


@pytest.mark.parametrize(("example", "label"), [(train_ddp, "DDP, 2 processes"),
                                                (train_fsdp2, "FSDP2, 2 processes")])
def test_processes_train_as_one(
    example: ModuleType, label: str, alone: list[float], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(small_ranks.mp, "spawn", spawn)
    monkeypatch.setattr(small_ranks, "alone", lambda _: alone)
    found = example.main(["--short"])
    assert list(found) == ["one process", label]
    assert alone[-1] < 0.9 * alone[0]
    # resumed in FP8: exponents are measured anew
    torch.testing.assert_close(torch.tensor(found[label]), torch.tensor(alone), rtol=0.01, atol=0)
    assert capsys.readouterr().out.count("\n") == 2
