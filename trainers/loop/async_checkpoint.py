"""Checkpoints are written beside training: training waits only while the state is copied."""

import json
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from online_meta.types import Params, TensorFilter
from streams.atomic_files import replace_file
from trainers.checkpoint import publish_checkpoint, write_shard
from trainers.distributed.ranks import RankGroup
from trainers.journal.journal import RunJournal
from trainers.settings_fingerprint import reproducibility_key


class BackgroundTask:
    """Does one piece of work at a time in a thread of its own; what it raises, the next call raises."""

    def __init__(self, name: str) -> None:
        """Start nothing yet; ``name`` is the thread's."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._future: Future[None] | None = None

    def is_idle(self) -> bool:
        """Return whether nothing is being done; raises what the last work raised."""
        if self._future is not None and self._future.done():
            self.finish()
        return self._future is None

    def start(self, function: Callable[[], None]) -> None:
        """Begin ``function``, when what was begun before is done; raises what that raised."""
        self.finish()
        self._future = self._pool.submit(function)

    def finish(self) -> None:
        """Wait until all is done; raises what it raised."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """End the thread; work that was begun is done first."""
        self._pool.shutdown()


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
