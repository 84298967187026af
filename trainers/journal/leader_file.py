"""The file that publishes the current leader: its meta-parameters and the rounds it has learned."""

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from online_meta.types import Meta, Params


class Published(NamedTuple):
    """The leader that adapting processes read: its rounds, the updates on past rounds alone since, and when."""

    rounds: int
    idle_updates: int
    at: float


def read_published_leader(leader: Path) -> Published:
    """Return how many rounds the published leader has learned, and the updates since; -1 rounds when there is none.

    Rounds that are played again after a kill are not published again: adapting never goes back.
    """
    if not leader.exists():
        return Published(-1, 0, 0.0)
    with safe_open(leader, "pt") as file:
        metadata = file.metadata()
        return Published(int(metadata["round"]), int(metadata.get("updates", 0)), 0.0)


def encode_leader(meta: Meta, rounds: int, idle_updates: int = 0) -> bytes:
    """Return meta-parameters as safetensors: weights by name, the rule's under ``rule.``, the round beside them.

    So are the ``idle_updates`` that were made on past rounds alone since then, where there are any.
    """
    tensors: Params = {**meta.weights, **{f"rule.{name}": value for name, value in meta.rule.items()}}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"round": str(rounds)} | ({"updates": str(idle_updates)} if idle_updates else {}))
