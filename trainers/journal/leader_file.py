"""The file that publishes the current leader: its meta-parameters and the rounds it has learned."""

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from online_meta.types import Meta, Params


class Published(NamedTuple):
    """The published leader.

    Attributes:
        rounds: number of rounds that it has learned; -1 if none is published.
        idle_updates: number of its updates on past rounds since.
        at: time of publication on the monotonic clock, in seconds; 0 if unknown.
    """

    rounds: int
    idle_updates: int
    at: float


def read_published_leader(leader: Path) -> Published:
    """Return what is known of the published leader.

    With it, rounds that are played again after a kill are not published again, so that the published leader never gets
    older.

    Args:
        leader: path of the file.
    """
    if not leader.exists():
        return Published(-1, 0, 0.0)
    with safe_open(leader, "pt") as file:
        metadata = file.metadata()
        return Published(int(metadata["round"]), int(metadata.get("updates", 0)), 0.0)


def encode_leader(meta: Meta, rounds: int, idle_updates: int = 0) -> bytes:
    """Return meta-parameters as the bytes of a safetensors file.

    Weights have their names; the inner rule's parameters have the prefix ``rule.``. The metadata contain the round and,
    if there are any, the idle updates.

    Args:
        meta: to encode.
        rounds: number of rounds learned.
        idle_updates: number of updates on past rounds since.
    """
    tensors: Params = {**meta.weights, **{f"rule.{name}": value for name, value in meta.rule.items()}}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"round": str(rounds)} | ({"updates": str(idle_updates)} if idle_updates else {}))
