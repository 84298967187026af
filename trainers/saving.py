"""Checkpoints are written beside training: training waits only while the state is copied."""

import json
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from online_meta.types import Params, TensorFilter
from streams.durable import replace_file
from trainers.checkpoint import publish_checkpoint, write_shard
from trainers.crew import RankGroup
from trainers.decisive import reproducibility_key
from trainers.desk import RunJournal

POLL_SECONDS = 0.01


def make_shard_filter(rank_group: RankGroup) -> TensorFilter:
    """Return which tensors of a state this rank writes: all ranks that see the run's folder share them evenly."""
    return lambda name: (
        rank_group.has_storage
        and zlib.crc32(name.encode()) % len(rank_group.with_storage) == rank_group.with_storage.index(rank_group.rank)
    )


def write_own_shard(unfinished: Path, rank_group: RankGroup, learners: Mapping[str, Params]) -> None:
    """Write the shard of a rank that does not lead, and tell the one that does."""
    shard = rank_group.with_storage.index(rank_group.rank)
    digests = write_shard(unfinished, shard, learners)
    replace_file(_digest_file(unfinished, shard), json.dumps(digests).encode(), durable=False)


class Snapshot(NamedTuple):
    """A rank's share of the state after ``rounds`` rounds, for which training stood still ``stall_seconds`` seconds."""

    rounds: int
    learners: dict[str, Params]
    stall_seconds: float


def complete_checkpoint(
    unfinished: Path, journal: RunJournal, rank_group: RankGroup, snapshot: Snapshot, pinned: Collection[int]
) -> None:
    """Write the leading rank's shard, wait for those of the others, publish the checkpoint; ``pinned`` older ones.

    All that was reported before is durable first.
    Raises ``OSError`` when the disk refuses, or another rank says nothing for as long as ranks wait for each other.
    """
    start_time = time.monotonic()
    journal.lines.sync()
    digests = write_shard(unfinished, 0, snapshot.learners)
    for shard in range(1, len(rank_group.with_storage)):
        digests |= _wait_for_digests(
            _digest_file(unfinished, shard), start_time + journal.settings.engine.timeout_seconds
        )
    keep = journal.settings.checkpoint.keep
    publish_checkpoint(unfinished, snapshot.rounds, digests, reproducibility_key(journal.settings), keep, pinned)
    line = {"timestamp": time.time(), "seconds": time.monotonic() - start_time, "stall": snapshot.stall_seconds}
    journal.checkpoints.append({"round": snapshot.rounds, **line})


def _digest_file(unfinished: Path, shard: int) -> Path:
    return unfinished / f".{shard}.json"


def _wait_for_digests(file: Path, deadline: float) -> dict[str, str]:
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another rank has not written its shard of the checkpoint: {file} is not there")
        time.sleep(POLL_SECONDS)
    digests: dict[str, str] = json.loads(file.read_bytes())
    file.unlink()
    return digests
