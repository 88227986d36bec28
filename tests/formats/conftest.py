"""Lets the tests of this folder import ``format_support``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever the order of the tests."""
    torch.manual_seed(0)
