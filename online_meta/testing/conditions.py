"""What every test runs under: import ``fixed_conditions`` in a conftest.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_conditions():
    """One thread (the bits depend on their number) and the same random numbers, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
