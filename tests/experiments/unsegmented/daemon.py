"""A stream without task boundaries as a daemon takes it in, by ``[[source]] kind = "python"`` and its own leader."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from online_meta.changepoints.segments import TaskSegment
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.types import Task
from streams.formats import wire
from streams.segmenting.by_leader import LeaderContext, NeedsLeader
from streams.sources import python
from streams.spec import Limits, TaskSpec
from torch import Tensor

SPEC = TaskSpec(x_shape=(1,), y="real", y_shape=(1,))
Samples = Sequence[tuple[Tensor, Tensor]]


class Taken(NamedTuple):
    """A segment, and the task that a daemon makes of it: half of its samples, drawn by its bytes, are the query."""

    segment: TaskSegment
    task: Task


def take(learner: FollowTheMetaLeader, stream: Samples, change: str, options: dict[str, Any]) -> Iterator[Taken]:
    """Yield what the source gives; whoever takes a task has ``learner`` learn it before asking for the next."""
    seen = 0

    def count() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal seen
        for pair in stream:
            seen += 1
            yield pair

    path = f"{__name__}:{pass_on.__name__}"
    settings = python.Settings(path, {"samples": count()}, change=change, change_options=options, likelihood="leader")
    follower = python.create_source(settings, SPEC, "stream", 0)
    assert isinstance(follower, NeedsLeader)
    source: Any = follower.create(_lead(learner))
    for arrival in source.read(None):
        if arrival is None:  # each is learned at once, so that nothing comes means that the stream has ended
            return
        source.ack([arrival])
        begin = int(arrival.id.removeprefix("stream-"))
        yield Taken(TaskSegment(begin, int(arrival.cursor), seen), wire.decode(arrival.body, SPEC, Limits()))


def pass_on(samples: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the samples."""
    return samples


def _lead(learner: FollowTheMetaLeader) -> LeaderContext:
    def count() -> int:
        return learner.round

    return LeaderContext(learner.inner, True, lambda: (learner.engine.meta(), learner.round), count, lambda many: [])
