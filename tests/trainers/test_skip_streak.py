"""The streak of skipped meta-steps at the end of a run's lines, read backwards from the end."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.journal.divergence import Rollback, SkipStreak, read_skip_streak
from trainers.journal.jsonl import LineWriter


def streak_of_all_lines(lines, ends):
    streak = SkipStreak()
    for line in lines:
        if line["round"] in ends:
            streak.reset()
        streak.observe(line)
    return streak


def write(path, skips):
    lines = [{"round": n, "steps": [{"skipped": one} for one in steps]} for n, steps in enumerate(skips)]
    writer = LineWriter(path)
    for line in lines:
        writer.append(line)
    writer.close()
    return lines


@settings(max_examples=60, deadline=None)
@given(
    early=st.integers(0, 300),
    late=st.lists(st.lists(st.sampled_from([None, "not_finite"]), max_size=2), max_size=8),
    bad=st.integers(0, 200),
    ends=st.lists(st.integers(0, 500), max_size=3),
    beyond=st.integers(0, 3),
)
def test_reading_from_the_end_gives_the_streak_of_all_lines(early, late, bad, ends, beyond):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.jsonl"
        lines = write(path, [[None]] * early + [["not_finite"]] * bad + late)
        rounds = max(len(lines) - beyond, 0)
        rollbacks = [Rollback(round, 0) for round in ends if round < rounds]
        found, right = (
            read_skip_streak(path, rounds, rollbacks),
            streak_of_all_lines(lines[:rounds], {one.round for one in rollbacks}),
        )
        assert (found.length, found.recovered) == (right.length, right.recovered)
        assert not found.length or found.first == right.first


def test_without_lines_there_is_no_streak(tmp_path):
    assert read_skip_streak(tmp_path / "none", 0, []) == SkipStreak()
