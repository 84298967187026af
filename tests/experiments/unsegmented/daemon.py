"""Segment a stream as a daemon does, with ``[[source]] kind = "python"`` and the likelihood of its own leader."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from online_meta.changepoints.segments import TaskSegment
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.types import Batch, Belief, State, Task
from streams.formats import wire
from streams.segmenting.by_leader import LeaderContext, NeedsLeader
from streams.sources import python
from streams.spec import Limits, TaskSpec
from torch import Tensor

SPEC = TaskSpec(x_shape=(1,), y="real", y_shape=(1,))
Samples = Sequence[tuple[Tensor, Tensor]]


class SegmentTask(NamedTuple):
    """A segment, and the task that a daemon makes of it; a pseudorandom half of the samples is the query set."""

    segment: TaskSegment
    task: Task


def segment_with_source(
    learner: FollowTheMetaLeader, stream: Samples, change: str, options: dict[str, Any]
) -> Iterator[SegmentTask]:
    """Yield the segments of the source; the caller must let ``learner`` learn each task before the next."""
    seen = 0

    def count() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal seen
        for pair in stream:
            seen += 1
            yield pair

    path = f"{__name__}:{yield_samples.__name__}"
    settings = python.Settings(path, {"samples": count()}, change=change, change_options=options, likelihood="leader")
    follower = python.create_source(settings, SPEC, "stream", 0)
    assert isinstance(follower, NeedsLeader)
    source: Any = follower.create(_make_context(learner))
    for arrival in source.read(None):
        if arrival is None:  # Each task is learned at once, so None means that the stream has ended.
            return
        source.ack([arrival])
        begin = int(arrival.id.removeprefix("stream-"))
        yield SegmentTask(TaskSegment(begin, int(arrival.cursor), seen), wire.decode(arrival.body, SPEC, Limits()))


def yield_samples(samples: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the samples unchanged, as the function that the source calls."""
    return samples


def _make_context(learner: FollowTheMetaLeader) -> LeaderContext:
    def count() -> int:
        return learner.round

    def believe(state: State, support: Batch) -> Belief:
        return learner.believe(state, support)[""]

    def latest() -> tuple[State, int]:
        return learner.state(), learner.round

    return LeaderContext(learner.answers, believe, learner.inner.loss, True, latest, count, lambda many: [])
