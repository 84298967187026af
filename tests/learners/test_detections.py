"""Delay, false alarms and missed changes, counted by hand."""

import math

import pytest

from online_meta.detections import compare
from online_meta.segments import Segment


def stream(*ends_and_seen, samples=100):
    """Return segments that end at the first and were known after the second number of each pair."""
    ends = [0, *(end for end, _ in ends_and_seen)]
    told = [Segment(begin, end, seen) for begin, (end, seen) in zip(ends, ends_and_seen, strict=False)]
    return [*told, Segment(ends[-1], samples, samples)]


def test_found_late_a_little_off_missed_and_false():
    found = compare([20, 50, 80], stream((20, 23), (35, 36), (52, 60)))
    assert (found.changes, found.missed, found.false_alarms, found.samples) == (3, 1, 1, 100)
    assert found.delays == (3, 10)
    assert found.misplaced == (0, 2)
    assert (found.mean_delay, found.false_per_thousand) == (6.5, 10.0)
    # 0-20 and 20-35 are pure; of 35-52 two belong to the next; of 52-100 the last 20
    assert found.purity == pytest.approx((20 + 15 + 15 + 28) / 100)


def test_a_change_is_not_found_before_it_came():
    assert compare([20], stream((18, 20))).delays == ()
    assert compare([20], stream((18, 21))).delays == (1,)


def test_an_end_too_far_off_is_false_and_leaves_the_change_to_another():
    found = compare([20], stream((31, 33)))
    assert (found.missed, found.false_alarms) == (1, 1)
    found = compare([20], stream((8, 33), (20, 34)))
    assert (found.missed, found.false_alarms, found.delays) == (0, 1, (14,))
    assert compare([20], stream((31, 33)), within=11).false_alarms == 0


def test_a_change_is_found_once_and_two_close_ones_apart():
    found = compare([20], stream((19, 30), (21, 31)))
    assert (found.false_alarms, found.delays, found.misplaced) == (1, (10,), (1,))
    found = compare([20, 24], stream((20, 30), (21, 31)))
    assert (found.missed, found.misplaced) == (0, (0, 3))
    found = compare([20, 24], stream((20, 30), (24, 31)))
    assert (found.delays, found.misplaced, found.missed) == ((10, 7), (0, 0), 0)


def test_no_change_and_nothing_found():
    found = compare([], stream())
    assert (found.changes, found.missed, found.false_alarms, found.purity) == (0, 0, 0, 1.0)
    assert math.isnan(found.mean_delay)


@pytest.mark.parametrize("changes", [[0], [100], [50, 20], [20, 20]])
def test_changes_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match="changes ascend and lie between 0 and 100"):
        compare(changes, stream())


@pytest.mark.parametrize(
    "segments", [[], [Segment(1, 5, 5)], [Segment(0, 5, 5), Segment(6, 9, 9)], [Segment(0, 5, 5), Segment(5, 5, 5)]]
)
def test_segments_that_are_no_stream_are_refused(segments):
    with pytest.raises(ValueError, match="each where the one before it ends"):
        compare([], segments)
