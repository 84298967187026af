"""How often the tests kill the processes of a daemon."""

import pytest


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """Return how often each process of the daemon is killed: ``pytest --kills 20`` for the long run."""
    return int(request.config.getoption("--kills"))
