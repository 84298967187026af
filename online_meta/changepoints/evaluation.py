"""How well a stream was segmented: delay, false alarms and missed changes against a known truth."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from online_meta.changepoints.segments import TaskSegment


class ChangepointMetrics(NamedTuple):
    """What became of the changes of a stream.

    Attributes:
        changes: how many there were.
        delays: of each change that was found, in order: how many samples of the new task had come when it was told of.
        missed: how many were not found.
        false_alarms: how many told of were none.
        samples: of the stream.
        misplaced: of each change that was found: by how many samples the place told is off.
        purity: the share of samples that are of the task that most samples of their segment are of, in (0, 1].
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
        """In samples; NaN where nothing was found."""
        return sum(self.delays) / len(self.delays) if self.delays else float("nan")

    @property
    def false_per_thousand(self) -> float:
        """False alarms a thousand samples."""
        return 1000 * self.false_alarms / self.samples


def evaluate_segments(
    changes: Sequence[int], segments: Sequence[TaskSegment], tolerance: int = 10
) -> ChangepointMetrics:
    """Compare the end of every segment but the last with where tasks really changed.

    An end belongs to the nearest change that it is at most ``tolerance`` samples off, that had come when it was told of
    and that no earlier end belongs to. An end that belongs to none is a false alarm.

    Args:
        changes: the places of the first samples of all tasks but the first, in ascending order.
        segments: the whole stream, as ``segment_samples`` cuts it.
        tolerance: how far off an end may be, in samples.

    Raises:
        ValueError: if the segments are not a whole stream, or a change lies outside it or out of order.
    """
    return evaluate_blocks(changes, segments, segments[-1].end if segments else 1, tolerance)[0]


def evaluate_blocks(
    changes: Sequence[int], segments: Sequence[TaskSegment], size: int, tolerance: int = 10
) -> list[ChangepointMetrics]:
    """Return what ``evaluate_segments`` does for each block of ``size`` samples, the last of which may be shorter.

    A change counts in the block in which it lies, whenever it is told of; a false alarm where the end is that was told.
    Raises what ``evaluate_segments`` does, and ``ValueError`` if ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}: a block has 1 sample or more")
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
    """Return the changes that were found, each with the segment that ends there."""
    ends = [0, *(segment.end for segment in segments)]
    if not segments or [segment.begin for segment in segments] != ends[:-1] or ends != sorted(set(ends)):
        raise ValueError("the segments are to begin at 0 and each where the one before it ends")
    samples = segments[-1].end
    if list(changes) != sorted(set(changes)) or any(not 0 < change < samples for change in changes):
        raise ValueError(f"changes ascend and lie between 0 and {samples}, both excluded")
    found: dict[int, TaskSegment] = {}
    for segment in segments[:-1]:
        candidates = [change for change in changes if change not in found and change < segment.detected_at]
        nearest = min(candidates, key=lambda change: abs(change - segment.end), default=None)
        if nearest is not None and abs(nearest - segment.end) <= tolerance:
            found[nearest] = segment
    return found


def _majority_samples(changes: Sequence[int], segment: TaskSegment) -> list[int]:
    """Return the samples of a segment that are of the task that most of them are of."""
    tasks = [bisect_right(changes, sample) for sample in range(segment.begin, segment.end)]
    (main, _), *_ = Counter(tasks).most_common(1)
    return [segment.begin + at for at, task in enumerate(tasks) if task == main]
