"""Learners do without the rounds that retention has taken, the same way whenever they are played."""

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
"""Each meta-step revisits all rounds that it may."""


def fill_to(history: History, rounds: int) -> None:
    fill(history, [task(t) for t in range(len(history), rounds)])


@pytest.fixture
def thinned(tmp_path: Path) -> History:
    """A history that was thinned out twice; nothing is removed yet."""
    with History.open(tmp_path / "history", write=True) as history:
        fill_to(history, FIRST)
        assert subsample(history, FIVE) == FIRST - 5
        fill_to(history, SECOND)
        assert subsample(history, FIVE) == SECOND - FIRST
        fill_to(history, ROUNDS)
        yield history


def test_only_what_is_kept_is_revisited(tmp_path: Path, thinned: History) -> None:
    play(tmp_path / "run", thinned, ROUNDS, WIDE)
    for line in lines(tmp_path / "run"):
        many = line["replayed"] // len(line["steps"])
        round = line["round"]
        decided = max([0, *(at for at in (FIRST, SECOND) if at <= round)])
        assert many == round + 1 - decided + (5 if decided else 0)


def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(tmp_path: Path, thinned: History) -> None:
    right = play(tmp_path / "whole", thinned, ROUNDS, WIDE)
    for _ in range(3 * ROUNDS):
        kill(tmp_path / "killed", thinned, 5, WIDE)
        if len(lines(tmp_path / "killed")) == ROUNDS:
            break
        compact(thinned, list_checkpoints(RunFiles(tmp_path / "killed").checkpoints)[0], 5)
    assert play(tmp_path / "killed", thinned, ROUNDS, WIDE) == right
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert count_discarded(thinned.query) >= FIRST - 5, "what no checkpoint needed was removed meanwhile"
