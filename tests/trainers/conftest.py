"""Histories that the tests in this folder play."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streams.history.history import History
from tests.support.runs import fill, task

ROUNDS = 9


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Yield a history of nine good rounds, shared by all tests: nothing may append to it."""
    with History.open(tmp_path_factory.mktemp("nine"), write=True) as opened:
        fill(opened, [task(t) for t in range(ROUNDS)])
        yield opened


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[History]:
    """Yield an empty history for one test."""
    with History.open(tmp_path / "own", write=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _restore_deterministic_algorithms() -> Iterator[None]:
    """Restore the setting after each test: opening a run turns deterministic algorithms on."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, nothing is committed because time has passed."""
    monkeypatch.setattr("trainers.loop.rounds.should_commit", lambda journal: False)
    monkeypatch.setattr("trainers.loop.rounds.should_report", lambda run, journal: False)
    monkeypatch.setattr("trainers.loop.rounds.PUBLISH_SECONDS", 1e9)
