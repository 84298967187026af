"""The ranks that play a run together: all do the same, and the first of them decides and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple


def _keep(value: Any) -> Any:
    return value


class Crew(NamedTuple):
    """This process, ``rank``, among ``world`` that play one run.

    ``share(value)`` returns on every rank, as JSON would give it back, what rank 0 called it with; all have to call it.
    """

    rank: int = 0
    world: int = 1
    share: Callable[[Any], Any] = _keep

    @property
    def leads(self) -> bool:
        """Whether this rank decides what all do, and writes what comes of it."""
        return self.rank == 0


ALONE = Crew()
