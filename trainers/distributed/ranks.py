"""The group of ranks that play a run: all compute the same updates; the coordinator decides and writes files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from online_meta.learners import gather_single_process
from online_meta.types import Params

PayloadsByRank = Mapping[int, Sequence[bytes]]
"""The payloads for each receiving rank, by its rank."""


def _return_value(value: Any) -> Any:
    return value


def _return_tensors(tensors: Params | None) -> Params:
    return tensors or {}


def _refuse_to_send(payloads: PayloadsByRank | None) -> Sequence[bytes]:
    raise RuntimeError("a single process has no other rank to send to")


class RankGroup(NamedTuple):
    """The ranks of a run, as seen by one of them; all ranks must call each collective.

    Attributes:
        rank: rank of this process.
        world: number of ranks.
        with_storage: ranks that can access the run's files; the first of them is the coordinator.
        broadcast: collective that returns on every rank the JSON value that the coordinator passed.
        broadcast_tensors: collective that returns on every rank the tensors that the coordinator passed.
        send: collective that sends the payloads that the coordinator passed to the remote ranks; each remote rank
            gets its own payloads returned.
        set_timeout: sets the time, in seconds, after which a rank that does not join a collective counts as dead.
        gather: collective that returns on every rank the JSON values that all ranks passed, in the order of ranks.
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
        """Whether this rank decides for all ranks and writes the run's files."""
        return self.rank == self.with_storage[0]

    @property
    def has_storage(self) -> bool:
        """Whether this rank can read and write the run's files."""
        return self.rank in self.with_storage

    @property
    def remote(self) -> tuple[int, ...]:
        """The ranks on other machines, which cannot access the run's files."""
        return tuple(rank for rank in range(self.world) if rank not in self.with_storage)


SINGLE_PROCESS = RankGroup()
