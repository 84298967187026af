"""The run's leader, as a source sees it that cuts a stream of samples by what the leader loses on them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from online_meta.inner import Inner
from online_meta.types import Meta, Task
from streams.arrivals import TaskSource


class LeaderContext(NamedTuple):
    """What such a source asks of the run.

    Attributes:
        inner: adapts the leader.
        squared_error: whether its loss is a mean square error; if not, it is taken for a negative log-likelihood.
        latest_leader: gives the newest leader, and how many rounds it has learned.
        count_rounds: says how many rounds there are.
        latest_tasks: gives the tasks of the newest so many rounds, or of as many as are kept.
    """

    inner: Inner
    squared_error: bool
    latest_leader: Callable[[], tuple[Meta, int]]
    count_rounds: Callable[[], int]
    latest_tasks: Callable[[int], Sequence[Task]]


class NeedsLeader(NamedTuple):
    """A source that does not know yet whom to follow: ``create(leading) -> source``, which may raise ``ValueError``."""

    create: Callable[[LeaderContext], TaskSource]
