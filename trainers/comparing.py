"""What a comparator is asked and what it answers; ``trainers/comparators`` has one a file.

Each offers ``refresh(setup, regret, asked, saved, proceed) -> RefreshResult | None``. It goes on from the state that was
``saved`` with its last answer, None before the first, and returns None as soon as ``proceed()`` is false. It raises
``ComparatorUnavailable`` when it can never answer again, and ``RoundDiscarded`` when retention has overtaken it this time.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from online_meta.regret import Comparator
from online_meta.setup import LearnerContext
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
