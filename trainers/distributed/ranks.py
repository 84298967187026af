"""The ranks that play a run together: all do the same, and one of them decides and writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from online_meta.learners import gather_single_process
from online_meta.types import Params

PayloadsByRank = Mapping[int, Sequence[bytes]]
"""For each rank that is to get something, by its number: what it gets."""


def _return_value(value: Any) -> Any:
    return value


def _return_tensors(tensors: Params | None) -> Params:
    return tensors or {}


def _refuse_to_send(payloads: PayloadsByRank | None) -> Sequence[bytes]:
    raise RuntimeError("a process that is alone has nobody to send anything to")


class RankGroup(NamedTuple):
    """This process, ``rank``, among ``world`` that play one run; those that are ``with_storage`` see the run's files.

    The first of these leads. ``broadcast(value)`` returns on every rank, as JSON would give it back, what the leader
    called it with; ``broadcast_tensors`` does so with tensors. ``gather(value)`` returns on every rank, as JSON gives
    it back, what each called it with, in the order of ranks. ``send(payloads)``, called by the leader with parcels for
    the ranks that are not near, returns there what is for them. All ranks have to call each of them. From
    ``set_timeout(seconds)`` on this rank takes one that lets it wait longer in any of them for dead.
    """

    rank: int = 0
    world: int = 1
    with_storage: tuple[int, ...] = (0,)
    broadcast: Callable[[Any], Any] = _return_value
    broadcast_tensors: Callable[[Params | None], Params] = _return_tensors
    send: Callable[[PayloadsByRank | None], Sequence[bytes]] = _refuse_to_send
    set_timeout: Callable[[float], None] = _return_value
    gather: Callable[[Any], list[Any]] = gather_single_process

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides what all do, and writes what comes of it."""
        return self.rank == self.with_storage[0]

    @property
    def has_storage(self) -> bool:
        """Whether this rank can read and write the run's files."""
        return self.rank in self.with_storage

    @property
    def remote(self) -> tuple[int, ...]:
        """The ranks on other machines, which cannot."""
        return tuple(rank for rank in range(self.world) if rank not in self.with_storage)


SINGLE_PROCESS = RankGroup()
