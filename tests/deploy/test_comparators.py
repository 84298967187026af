"""The comparators' process: when it refreshes, and how it handles a diverged or an unavailable comparator."""

import threading
from pathlib import Path

import pytest

from deploy.processes.comparators import next_target, refresh_with_rounds
from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator
from streams.history.history import History
from streams.types import Record
from tests.support.daemon import sinusoid
from trainers.comparators import ComparatorUnavailable, RefreshRequest, RefreshResult, dynamic, hindsight
from trainers.journal.jsonl import LineReader, LineWriter
from trainers.journal.run_files import RunFiles
from trainers.settings import ModelSettings, RegretSettings, TrainerSettings

SETTINGS = TrainerSettings(
    ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [4]}, "mse"),
    regret=RegretSettings(every_rounds=2, comparator=("hindsight", "dynamic")),
)


@pytest.mark.parametrize(
    ("covered", "learned", "rests", "target"),
    [
        (0, 0, True, None),
        (0, 49, False, None),
        (0, 49, True, 49),
        (0, 120, False, 100),
        (100, 149, False, None),
        (100, 149, True, 149),
        (149, 151, False, 150),
        (150, 150, True, None),
    ],
)
def test_it_refreshes_every_few_rounds_and_when_idle(
    covered: int, learned: int, rests: bool, target: int | None
) -> None:
    assert next_target(covered, learned, 50, rests) == target


class StopAfter:
    """A stop signal that is set after a given number of checks."""

    def __init__(self, checks: int) -> None:
        self.checks = checks

    def is_set(self) -> bool:
        self.checks -= 1
        return self.checks < 0

    def wait(self, seconds: float) -> bool:
        return self.is_set()


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """A run of two rounds."""
    files = RunFiles(tmp_path)
    with History.open(files.history, write=True) as history:
        history.append([Record(f"t{n}", sinusoid(n), bytes(32), "s", None, 0.0) for n in range(2)])
    lines = LineWriter(files.rounds)
    for round in range(2):
        lines.append({"round": round, "skipped": None})
    lines.close()
    return files


def refresh_until_stopped(files: RunFiles, checks: int) -> None:
    with History.open(files.history, write=False) as history:
        refresh_with_rounds(SETTINGS, files, history, StopAfter(checks))  # type: ignore[arg-type]


def test_a_nonfinite_comparator_is_not_written_and_starts_again(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh(setup: LearnerContext, regret: RegretSettings, asked: RefreshRequest, *_: object) -> RefreshResult:
        setup.buffer.prefetch("hindsight", [0])
        assert "read-ahead" in [thread.name for thread in threading.enumerate()]
        return RefreshResult(Comparator("hindsight", asked.rounds, float("nan"), 0.0), {})

    monkeypatch.setattr(hindsight, "refresh", refresh)
    files.comparator("hindsight").write_bytes(b"astray")
    refresh_until_stopped(files, 2000)
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()], "its read-ahead thread is closed too"
    assert [line["kind"] for line in LineReader(files.comparators).refresh()] == ["dynamic"], "the other is refreshed"
    assert not files.comparator("hindsight").exists()


def test_an_unavailable_comparator_is_skipped_and_the_others_continue(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked_for: list[int] = []

    def refresh(setup: LearnerContext, regret: RegretSettings, asked: RefreshRequest, *_: object) -> RefreshResult:
        asked_for.append(asked.rounds)
        raise ComparatorUnavailable("there is no answer")

    monkeypatch.setattr(dynamic, "refresh", refresh)
    refresh_until_stopped(files, 2000)
    assert asked_for == [2]
    assert "dynamic is no longer refreshed: there is no answer" in caplog.text
    (line,) = LineReader(files.comparators).refresh()
    assert (line["kind"], line["as_of_round"], line["standard_error"]) == ("hindsight", 2, 0.0)
    assert {"settled", "timestamp"} < line.keys()
    refresh_until_stopped(files, 2000)
    assert asked_for == [2, 2], "the next process tries again"
    assert len(LineReader(files.comparators).refresh()) == 1, "a finished comparator is not computed again"
