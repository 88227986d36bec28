"""One thread: the machine is shared and the tensors are small."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever the order of the tests."""
    torch.manual_seed(0)
