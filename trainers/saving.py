"""Checkpoints are written beside training: training waits only while the state is copied."""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from online_meta.types import Keep, Params
from trainers.checkpoint import publish_checkpoint, write_shard
from trainers.crew import Crew
from trainers.decisive import decisive
from trainers.desk import Desk
from trainers.durable import replace_file

POLL_SECONDS = 0.01


class Aside:
    """Does one piece of work at a time in a thread of its own; what it raises, the next call raises."""

    def __init__(self, name: str) -> None:
        """Start nothing yet; ``name`` is the thread's."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None

    def idle(self) -> bool:
        """Return whether nothing is being done; raises what the last work raised."""
        if self._last is not None and self._last.done():
            self.finish()
        return self._last is None

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work``, when what was begun before is done; raises what that raised."""
        self.finish()
        self._last = self._pool.submit(work)

    def finish(self) -> None:
        """Wait until all is done; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread; work that was begun is done first."""
        self._pool.shutdown()


def kept_by(crew: Crew) -> Keep:
    """Return which tensors of a state this rank writes: all ranks that see the run's folder share them evenly."""
    return lambda name: crew.writes and zlib.crc32(name.encode()) % len(crew.near) == crew.near.index(crew.rank)


def write_own_shard(unfinished: Path, crew: Crew, learners: Mapping[str, Params]) -> None:
    """Write the shard of a rank that does not lead, and tell the one that does."""
    shard = crew.near.index(crew.rank)
    digests = write_shard(unfinished, shard, learners)
    replace_file(_word(unfinished, shard), json.dumps(digests).encode(), durable=False)


def write_whole(
    unfinished: Path, desk: Desk, crew: Crew, rounds: int, learners: dict[str, Params], stall: float
) -> None:
    """Write the leading rank's shard, wait for those of the others, and publish the checkpoint of ``rounds`` rounds.

    All that was reported before is durable first. ``stall`` is how many seconds training stood still for it.
    Raises ``OSError`` when the disk refuses, or another rank says nothing for as long as ranks wait for each other.
    """
    began = time.monotonic()
    desk.lines.sync()
    digests = write_shard(unfinished, 0, learners)
    for shard in range(1, len(crew.near)):
        digests |= _hear(_word(unfinished, shard), began + desk.settings.engine.timeout_seconds)
    publish_checkpoint(unfinished, rounds, digests, decisive(desk.settings), desk.settings.checkpoint.keep)
    seconds = time.monotonic() - began
    desk.checkpoints.append({"round": rounds, "timestamp": time.time(), "seconds": seconds, "stall": stall})


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
