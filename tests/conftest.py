"""What every test must leave behind as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

from tests.done_once import arrange


def pytest_collection_finish() -> None:
    arrange()


@pytest.fixture(autouse=True)
def same_gradient_mode() -> Iterator[None]:
    """A switched-off autograd would make another test fail, far away."""
    before = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == before
