"""Write checkpoints in the background: training pauses only while the state is copied."""

import json
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from online_meta.types import Params, TensorFilter
from streams.atomic_files import replace_file
from streams.history.erasure import count_erasures
from trainers.checkpoint import publish_checkpoint, write_shard
from trainers.distributed.ranks import RankGroup
from trainers.journal.journal import RunJournal
from trainers.settings_fingerprint import reproducibility_key


class BackgroundTask:
    """A thread that runs one function at a time; an exception is raised by the next call of a method.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        """Start idle."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._future: Future[None] | None = None

    def is_idle(self) -> bool:
        """Return whether no function is running; raises the exception of the last one."""
        if self._future is not None and self._future.done():
            self.finish()
        return self._future is None

    def start(self, function: Callable[[], None]) -> None:
        """Wait for the previous function, raise its exception if it had one, and start ``function``."""
        self.finish()
        self._future = self._pool.submit(function)

    def finish(self) -> None:
        """Wait for the running function; raises its exception."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """Wait for the running function and end the thread."""
        self._pool.shutdown()


POLL_SECONDS = 0.01


def make_shard_filter(rank_group: RankGroup) -> TensorFilter:
    """Return the filter of the tensors that this rank writes; the ranks with storage share them about evenly."""
    return lambda name: (
        rank_group.has_storage
        and zlib.crc32(name.encode()) % len(rank_group.with_storage) == rank_group.with_storage.index(rank_group.rank)
    )


def write_own_shard(unfinished: Path, rank_group: RankGroup, learners: Mapping[str, Params]) -> None:
    """Write the shard of a rank other than the coordinator, and the file of digests for which the coordinator waits.

    Args:
        unfinished: folder of the checkpoint.
        rank_group: of the run.
        learners: this rank's tensors of each learner.
    """
    shard = rank_group.with_storage.index(rank_group.rank)
    digests = write_shard(unfinished, shard, learners)
    replace_file(_digest_file(unfinished, shard), json.dumps(digests).encode(), durable=False)


class Snapshot(NamedTuple):
    """A rank's share of the learners' state.

    Attributes:
        rounds: number of rounds that the state has learned.
        learners: tensors of each learner.
        stall_seconds: time for which training paused to copy the state.
    """

    rounds: int
    learners: dict[str, Params]
    stall_seconds: float


def complete_checkpoint(
    unfinished: Path, journal: RunJournal, rank_group: RankGroup, snapshot: Snapshot, pinned: Collection[int]
) -> None:
    """Write the coordinator's shard, wait for the other shards, and publish the checkpoint.

    The round records of all learned rounds are made durable first.

    Args:
        unfinished: folder of the checkpoint.
        journal: of the run.
        rank_group: of the run.
        snapshot: of the coordinator.
        pinned: rounds of older checkpoints that must not be removed.

    Raises:
        OSError: if a file cannot be written, or another rank's shard is missing after ``engine.timeout_seconds``.
    """
    start_time = time.monotonic()
    journal.lines.sync()
    digests = write_shard(unfinished, 0, snapshot.learners)
    for shard in range(1, len(rank_group.with_storage)):
        digests |= _wait_for_digests(
            _digest_file(unfinished, shard), start_time + journal.settings.engine.timeout_seconds
        )
    keep = journal.settings.checkpoint.keep
    key, erasures = reproducibility_key(journal.settings), count_erasures(journal.files.history)
    publish_checkpoint(unfinished, snapshot.rounds, digests, key, keep, pinned, erasures)
    line = {"timestamp": time.time(), "seconds": time.monotonic() - start_time, "stall": snapshot.stall_seconds}
    journal.checkpoints.append({"round": snapshot.rounds, **line})


def _digest_file(unfinished: Path, shard: int) -> Path:
    return unfinished / f".{shard}.json"


def _wait_for_digests(file: Path, deadline: float) -> dict[str, str]:
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another rank has not written its shard of the checkpoint: {file} is missing")
        time.sleep(POLL_SECONDS)
    digests: dict[str, str] = json.loads(file.read_bytes())
    file.unlink()
    return digests
