"""Comparators, which a run's regret is measured against: one a file, each with a ``refresh``."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator
from online_meta.types import Meta, Params
from trainers.settings import RegretSettings


class RefreshRequest(NamedTuple):
    """What would have been lost in the rounds 0..``rounds`` - 1?

    It was last asked as of round ``covered``. Rounds in ``skipped`` count for no learner, so they are left out.
    ``warm_start`` are meta-parameters that may be near a good answer, such as the newest leader.
    """

    rounds: int
    covered: int = 0
    skipped: Collection[int] = ()
    warm_start: Meta | None = None


class RefreshResult(NamedTuple):
    """A refreshed comparator, and the state from which its next refresh goes on."""

    comparator: Comparator
    saved: Params


class ComparatorUnavailable(RuntimeError):
    """A comparator cannot be refreshed any more, now or later."""


Refresh = Callable[
    [LearnerContext, RegretSettings, RefreshRequest, Params | None, Callable[[], bool]], RefreshResult | None
]


def always_continue() -> bool:
    """Proceed."""
    return True
