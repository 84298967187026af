"""Delay, false alarms and missed changes of hand-counted examples."""

import math

import pytest

from online_meta.changepoints.evaluation import evaluate_blocks, evaluate_segments
from online_meta.changepoints.segments import TaskSegment


def stream(*ends_and_seen, samples=100):
    """Return segments from pairs of (end, detected at)."""
    ends = [0, *(end for end, _ in ends_and_seen)]
    detected = [TaskSegment(begin, end, seen) for begin, (end, seen) in zip(ends, ends_and_seen, strict=False)]
    return [*detected, TaskSegment(ends[-1], samples, samples)]


def test_late_displaced_missed_and_false_detections():
    found = evaluate_segments([20, 50, 80], stream((20, 23), (35, 36), (52, 60)))
    assert (found.changes, found.missed, found.false_alarms, found.samples) == (3, 1, 1, 100)
    assert found.delays == (3, 10)
    assert found.misplaced == (0, 2)
    assert (found.mean_delay, found.false_per_thousand) == (6.5, 10.0)
    # 0-20 and 20-35 are pure; two samples of 35-52 belong to the next task; so do the last 20 of 52-100
    assert found.purity == pytest.approx((20 + 15 + 15 + 28) / 100)


def test_a_change_is_not_detected_before_it_happens():
    assert evaluate_segments([20], stream((18, 20))).delays == ()
    assert evaluate_segments([20], stream((18, 21))).delays == (1,)


def test_an_end_outside_the_tolerance_is_a_false_alarm():
    found = evaluate_segments([20], stream((31, 33)))
    assert (found.missed, found.false_alarms) == (1, 1)
    found = evaluate_segments([20], stream((8, 33), (20, 34)))
    assert (found.missed, found.false_alarms, found.delays) == (0, 1, (14,))
    assert evaluate_segments([20], stream((31, 33)), tolerance=11).false_alarms == 0


def test_each_change_is_matched_with_one_detection():
    found = evaluate_segments([20], stream((19, 30), (21, 31)))
    assert (found.false_alarms, found.delays, found.misplaced) == (1, (10,), (1,))
    found = evaluate_segments([20, 24], stream((20, 30), (21, 31)))
    assert (found.missed, found.misplaced) == (0, (0, 3))
    found = evaluate_segments([20, 24], stream((20, 30), (24, 31)))
    assert (found.delays, found.misplaced, found.missed) == ((10, 7), (0, 0), 0)


def test_a_stream_without_changes_or_detections():
    found = evaluate_segments([], stream())
    assert (found.changes, found.missed, found.false_alarms, found.purity) == (0, 0, 0, 1.0)
    assert math.isnan(found.mean_delay)


def test_blocks_count_only_their_own_changes_and_samples():
    segments = stream((20, 23), (35, 36), (52, 60))
    first, second, third = evaluate_blocks([20, 50, 80], segments, 40)
    assert [block.samples for block in (first, second, third)] == [40, 40, 20]
    assert [block.changes for block in (first, second, third)] == [1, 1, 1]
    assert (first.delays, first.false_alarms, first.missed) == ((3,), 1, 0)
    assert (second.delays, second.misplaced, second.false_alarms, second.missed) == ((10,), (2,), 0, 0)
    assert (third.delays, third.false_alarms, third.missed) == ((), 0, 1)
    # 35-52 belongs to the second task except 50 and 51; 52-100 to the third except the last 20
    assert [block.purity for block in (first, second, third)] == pytest.approx([1.0, 38 / 40, 0.0])
    (whole,) = evaluate_blocks([20, 50, 80], segments, 100)
    assert whole == evaluate_segments([20, 50, 80], segments)


def test_an_empty_block_size_is_refused():
    with pytest.raises(ValueError, match="size is 0"):
        evaluate_blocks([20], stream(), 0)


@pytest.mark.parametrize("changes", [[0], [100], [50, 20], [20, 20]])
def test_impossible_changes_are_refused(changes):
    with pytest.raises(ValueError, match="changes must ascend and lie strictly between 0 and 100"):
        evaluate_segments(changes, stream())


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [TaskSegment(1, 5, 5)],
        [TaskSegment(0, 5, 5), TaskSegment(6, 9, 9)],
        [TaskSegment(0, 5, 5), TaskSegment(5, 5, 5)],
    ],
)
def test_segments_that_do_not_cover_a_stream_are_refused(segments):
    with pytest.raises(ValueError, match="every other one where the previous one ends"):
        evaluate_segments([], segments)
