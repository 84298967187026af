"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_conditions():
    """One thread (the bits depend on their number) and the same random numbers, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the recovery tests kill each process of the daemon."""
    parser.addoption("--kills", type=int, default=2, help="kill -9 each process of the daemon so often (default 2)")
