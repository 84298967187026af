"""What every test runs under."""

import pytest

from online_meta.testing.conditions import fixed_conditions

__all__ = ["fixed_conditions"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the recovery tests kill each process of the daemon."""
    parser.addoption("--kills", type=int, default=2, help="kill -9 each process of the daemon so often (default 2)")
