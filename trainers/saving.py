"""Checkpoints are written beside training: training waits only while the state is copied."""

import json
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from online_meta.types import Keep, Params
from streams.durable import replace_file
from trainers.checkpoint import publish_checkpoint, write_shard
from trainers.crew import Crew
from trainers.decisive import decisive
from trainers.desk import Desk

POLL_SECONDS = 0.01


def kept_by(crew: Crew) -> Keep:
    """Return which tensors of a state this rank writes: all ranks that see the run's folder share them evenly."""
    return lambda name: crew.writes and zlib.crc32(name.encode()) % len(crew.near) == crew.near.index(crew.rank)


def write_own_shard(unfinished: Path, crew: Crew, learners: Mapping[str, Params]) -> None:
    """Write the shard of a rank that does not lead, and tell the one that does."""
    shard = crew.near.index(crew.rank)
    digests = write_shard(unfinished, shard, learners)
    replace_file(_word(unfinished, shard), json.dumps(digests).encode(), durable=False)


class Snapshot(NamedTuple):
    """A rank's share of the state after ``rounds`` rounds, for which training stood still ``stall`` seconds."""

    rounds: int
    learners: dict[str, Params]
    stall: float


def write_whole(unfinished: Path, desk: Desk, crew: Crew, snapshot: Snapshot, hold: Collection[int]) -> None:
    """Write the leading rank's shard, wait for those of the others, publish the checkpoint; ``hold`` older ones.

    All that was reported before is durable first.
    Raises ``OSError`` when the disk refuses, or another rank says nothing for as long as ranks wait for each other.
    """
    began = time.monotonic()
    desk.lines.sync()
    digests = write_shard(unfinished, 0, snapshot.learners)
    for shard in range(1, len(crew.near)):
        digests |= _hear(_word(unfinished, shard), began + desk.settings.engine.timeout_seconds)
    keep = desk.settings.checkpoint.keep
    publish_checkpoint(unfinished, snapshot.rounds, digests, decisive(desk.settings), keep, hold)
    line = {"timestamp": time.time(), "seconds": time.monotonic() - began, "stall": snapshot.stall}
    desk.checkpoints.append({"round": snapshot.rounds, **line})


def _word(unfinished: Path, shard: int) -> Path:
    return unfinished / f".{shard}.json"


def _hear(word: Path, deadline: float) -> dict[str, str]:
    while not word.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another rank has not written its shard of the checkpoint: {word} is not there")
        time.sleep(POLL_SECONDS)
    digests: dict[str, str] = json.loads(word.read_bytes())
    word.unlink()
    return digests
