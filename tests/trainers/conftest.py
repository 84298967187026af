"""Histories that the tests of this folder play."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streams.history.history import History
from tests.support.runs import fill, task

ROUNDS = 9


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Nine good rounds; nobody appends to them."""
    with History.open(tmp_path_factory.mktemp("nine"), write=True) as opened:
        fill(opened, [task(t) for t in range(ROUNDS)])
        yield opened


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[History]:
    """A history of the test's own."""
    with History.open(tmp_path / "own", write=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _same_torch_afterwards() -> Iterator[None]:
    """Opening a run asks torch for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
