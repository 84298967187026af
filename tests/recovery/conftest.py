"""How often the processes of a daemon are killed."""

import pytest


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How many times each process of the daemon is killed: ``pytest --kills 20`` for the long run."""
    return int(request.config.getoption("--kills"))
