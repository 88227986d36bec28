"""One small model, captured once."""

from __future__ import annotations

from typing import Any

import pytest

from scaleprop.passes.base import Program
from tests.interchange.tiny import captured, llama


@pytest.fixture(scope="session")
def model() -> Any:
    return llama()


@pytest.fixture(scope="session")
def program(model: Any) -> Program:
    return captured(model)
