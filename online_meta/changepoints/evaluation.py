"""Evaluate a segmentation against known changepoints: detection delay, false alarms and missed changes."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from online_meta.changepoints.segments import TaskSegment


class ChangepointMetrics(NamedTuple):
    """Detection metrics of a stream or a block of it.

    Attributes:
        changes: number of true changes.
        delays: for each detected change, in order, the samples of the new task seen before it was reported.
        missed: number of changes not detected.
        false_alarms: number of reported changes that match no true change.
        samples: number of samples.
        misplaced: for each detected change, in order, the distance in samples between reported and true position.
        purity: share of samples that belong to the majority task of their segment, in (0, 1].
    """

    changes: int
    delays: tuple[int, ...]
    missed: int
    false_alarms: int
    samples: int
    misplaced: tuple[int, ...]
    purity: float

    @property
    def mean_delay(self) -> float:
        """The mean of ``delays`` in samples; NaN if no change was detected."""
        return sum(self.delays) / len(self.delays) if self.delays else float("nan")

    @property
    def false_per_thousand(self) -> float:
        """The number of false alarms per 1,000 samples."""
        return 1000 * self.false_alarms / self.samples


def evaluate_segments(
    changes: Sequence[int], segments: Sequence[TaskSegment], tolerance: int = 10
) -> ChangepointMetrics:
    """Compare the end of every segment except the last with the true changes.

    An end matches the nearest change within ``tolerance`` samples that had occurred when the end was reported and that
    no earlier end matches. An end without a match is a false alarm.

    Args:
        changes: the index of the first sample of every task except the first, in ascending order.
        segments: the whole stream, as ``segment_samples`` yields it.
        tolerance: the largest distance between an end and its change, in samples.

    Returns:
        The metrics over the whole stream.

    Raises:
        ValueError: if the segments do not cover a whole stream, or ``changes`` are out of order or out of range.
    """
    return evaluate_blocks(changes, segments, segments[-1].end if segments else 1, tolerance)[0]


def evaluate_blocks(
    changes: Sequence[int], segments: Sequence[TaskSegment], size: int, tolerance: int = 10
) -> list[ChangepointMetrics]:
    """Return the metrics of ``evaluate_segments`` for each block of ``size`` samples; the last block may be shorter.

    A change counts in the block that contains it, no matter when it was reported; a false alarm counts in the block
    that contains the reported end. Raises ``ValueError`` as ``evaluate_segments`` does, and if ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; a block must have at least 1 sample")
    found = _match(changes, segments, tolerance)
    samples = segments[-1].end
    right = set(found.values())
    false = [segment.end for segment in segments[:-1] if segment not in right]
    blocks = [range(first, min(first + size, samples)) for first in range(0, samples, size)]
    majority = [0] * len(blocks)
    for segment in segments:
        for at in _majority_samples(changes, segment):
            majority[at // size] += 1
    return [_count(changes, found, false, block, majority[place]) for place, block in enumerate(blocks)]


def _count(
    changes: Sequence[int], found: dict[int, TaskSegment], false: list[int], block: range, majority: int
) -> ChangepointMetrics:
    here = [change for change in changes if change in block]
    detected = [change for change in here if change in found]
    return ChangepointMetrics(
        len(here),
        tuple(found[change].detected_at - change for change in detected),
        len(here) - len(detected),
        sum(end in block for end in false),
        len(block),
        tuple(abs(found[change].end - change) for change in detected),
        majority / len(block),
    )


def _match(changes: Sequence[int], segments: Sequence[TaskSegment], tolerance: int) -> dict[int, TaskSegment]:
    """Map each detected change to the segment whose end matches it."""
    ends = [0, *(segment.end for segment in segments)]
    if not segments or [segment.begin for segment in segments] != ends[:-1] or ends != sorted(set(ends)):
        raise ValueError("the first segment must begin at 0, and every other one where the previous one ends")
    samples = segments[-1].end
    if list(changes) != sorted(set(changes)) or any(not 0 < change < samples for change in changes):
        raise ValueError(f"changes must ascend and lie strictly between 0 and {samples}")
    found: dict[int, TaskSegment] = {}
    for segment in segments[:-1]:
        candidates = [change for change in changes if change not in found and change < segment.detected_at]
        nearest = min(candidates, key=lambda change: abs(change - segment.end), default=None)
        if nearest is not None and abs(nearest - segment.end) <= tolerance:
            found[nearest] = segment
    return found


def _majority_samples(changes: Sequence[int], segment: TaskSegment) -> list[int]:
    """Return the indices of a segment's samples that belong to its majority task."""
    tasks = [bisect_right(changes, sample) for sample in range(segment.begin, segment.end)]
    (main, _), *_ = Counter(tasks).most_common(1)
    return [segment.begin + at for at, task in enumerate(tasks) if task == main]
