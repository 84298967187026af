"""The run's leader, as a source sees it that cuts a stream of samples by what the leader loses on them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from online_meta.inner import Inner
from online_meta.types import Meta, Task
from streams.arrivals import TaskSource


class Leading(NamedTuple):
    """What such a source asks of the run.

    Attributes:
        inner: adapts the leader.
        squares: whether its loss is a mean square error; if not, it is taken for a negative log-likelihood.
        newest: gives the newest leader, and how many rounds it has learned.
        committed: says how many rounds there are.
        last: gives the tasks of the newest so many rounds, or of as many as are kept.
    """

    inner: Inner
    squares: bool
    newest: Callable[[], tuple[Meta, int]]
    committed: Callable[[], int]
    last: Callable[[int], Sequence[Task]]


class Follower(NamedTuple):
    """A source that does not know yet whom to follow: ``follow(leading) -> source``, which may raise ``ValueError``."""

    follow: Callable[[Leading], TaskSource]
