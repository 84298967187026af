"""Learners work without the rounds that retention has discarded, identically on every replay."""

from pathlib import Path

import pytest

from streams.history.history import History
from streams.history.retention import RetentionSettings, compact, count_discarded, subsample
from tests.support.runs import SETTINGS, changed, fill, kill, lines, play, task
from trainers.checkpoint import list_checkpoints
from trainers.journal.run_files import RunFiles

FIVE = RetentionSettings(rounds=5)
FIRST, SECOND, ROUNDS = 12, 20, 26
WIDE = changed(SETTINGS, meta={"batch": 100}, checkpoint={"every_rounds": 2, "keep": 2})
"""Each meta-step revisits all rounds that are available."""


def fill_to(history: History, rounds: int) -> None:
    fill(history, [task(t) for t in range(len(history), rounds)])


@pytest.fixture
def subsampled(tmp_path: Path) -> History:
    """Yield a history that was subsampled twice and not yet compacted."""
    with History.open(tmp_path / "history", write=True) as history:
        fill_to(history, FIRST)
        assert subsample(history, FIVE) == FIRST - 5
        fill_to(history, SECOND)
        assert subsample(history, FIVE) == SECOND - FIRST
        fill_to(history, ROUNDS)
        yield history


def test_only_retained_rounds_are_revisited(tmp_path: Path, subsampled: History) -> None:
    play(tmp_path / "run", subsampled, ROUNDS, WIDE)
    for line in lines(tmp_path / "run"):
        revisited = line["replayed"] // len(line["steps"])
        round = line["round"]
        decided = max([0, *(at for at in (FIRST, SECOND) if at <= round)])
        assert revisited == round + 1 - decided + (5 if decided else 0)


def test_a_run_killed_repeatedly_gives_the_same_bits_under_retention(tmp_path: Path, subsampled: History) -> None:
    right = play(tmp_path / "whole", subsampled, ROUNDS, WIDE)
    for _ in range(3 * ROUNDS):
        kill(tmp_path / "killed", subsampled, 5, WIDE)
        if len(lines(tmp_path / "killed")) == ROUNDS:
            break
        compact(subsampled, list_checkpoints(RunFiles(tmp_path / "killed").checkpoints)[0], 5)
    assert play(tmp_path / "killed", subsampled, ROUNDS, WIDE) == right
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert count_discarded(subsampled.query) >= FIRST - 5, "rounds that no checkpoint needed were removed meanwhile"
