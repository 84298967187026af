"""The ranks that play a run together: all do the same, and one of them decides and writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from online_meta.setup import keep_alone
from online_meta.types import Params

Parcels = Mapping[int, Sequence[bytes]]
"""For each rank that is to get something, by its number: what it gets."""


def _keep(value: Any) -> Any:
    return value


def _keep_tensors(tensors: Params | None) -> Params:
    return tensors or {}


def _keep_parcels(parcels: Parcels | None) -> Sequence[bytes]:
    raise RuntimeError("a process that is alone has nobody to send anything to")


class Crew(NamedTuple):
    """This process, ``rank``, among ``world`` that play one run; those that are ``near`` see the run's files.

    The first of these leads. ``share(value)`` returns on every rank, as JSON would give it back, what the leader
    called it with; ``share_tensors`` does so with tensors. ``gather(value)`` returns on every rank, as JSON would give
    it back, what each called it with, in the order of ranks. ``send(parcels)``, called by the leader with parcels for
    the ranks that are not near, returns there what is for them. All ranks have to call each of them. From
    ``wait_at_most(seconds)`` on this rank takes one that lets it wait longer in any of them for dead.
    """

    rank: int = 0
    world: int = 1
    near: tuple[int, ...] = (0,)
    share: Callable[[Any], Any] = _keep
    share_tensors: Callable[[Params | None], Params] = _keep_tensors
    send: Callable[[Parcels | None], Sequence[bytes]] = _keep_parcels
    wait_at_most: Callable[[float], None] = _keep
    gather: Callable[[Any], list[Any]] = keep_alone

    @property
    def leads(self) -> bool:
        """Whether this rank decides what all do, and writes what comes of it."""
        return self.rank == self.near[0]

    @property
    def writes(self) -> bool:
        """Whether this rank can read and write the run's files."""
        return self.rank in self.near

    @property
    def far(self) -> tuple[int, ...]:
        """The ranks on other machines, which cannot."""
        return tuple(rank for rank in range(self.world) if rank not in self.near)


ALONE = Crew()
