"""What every test runs under."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from online_meta.testing.conditions import fixed_conditions
from streams.private_files import private_umask
from tests import tiers

__all__ = ["fixed_conditions"]

# The same examples in every run, for CI: a change fails for what it changes. `make test` draws others each time.
settings.register_profile("repeatable", derandomize=True)


@pytest.fixture(scope="session", autouse=True)
def private_files() -> Iterator[None]:
    """Let all tests write private files, because secrets that others can read are refused."""
    with private_umask():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let all tests share compiled programs among themselves, and not with the user's own runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the recovery tests kill each process of the daemon, and which of the slow tests run."""
    parser.addoption("--kills", type=int, default=2, help="kill -9 each process of the daemon so often (default 2)")
    parts = range(tiers.PARTS)
    parser.addoption("--slow-part", type=int, choices=parts, help=f"run this of {tiers.PARTS} parts of the slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow tests, and leave those of other parts out; ``-m "not slow"`` and ``-m slow`` choose, too."""
    part = config.getoption("--slow-part")
    for item in items:
        case = item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""
        if tiers.is_slow(getattr(item, "originalname", item.name), case):
            item.add_marker(pytest.mark.slow)
    if part is not None:
        others = [item for item in items if item.get_closest_marker("slow") and tiers.part_of(item.nodeid) != part]
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]
