"""The heartbeat of a process: a small file in which its main loop reports that it is alive, and its phase.

The reader compares two contents with its own clock, so that no clock of another process matters. The file has a fixed
size and is overwritten in place: a full disk does not stop a heartbeat.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from streams.history.errors import ArchiveUnreachable, HistoryFull

SIZE_BYTES = 4096
WRITE_SECONDS = 0.1
"""A heartbeat that repeats the last one is written this often at most."""

STARTING, REPLAYING, COMPILING, PLAYING, WAITING, ENDED = (
    "starting",
    "replaying",
    "compiling",
    "playing",
    "waiting",
    "ended",
)
"""What a process does. It replays rounds that were played before; it compiles while it plays; it waits for tasks."""

DISK, ARCHIVE = "disk", "archive"
"""Causes outside of a process for which it ends."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
RUST_NO_SPACE = "os error 28"
"""How an error of safetensors names a full disk."""
IDLE_SHARE = 0.01
"""A process that uses less than this share of a processor does nothing."""


@dataclass(frozen=True)
class Heartbeat:
    """One heartbeat.

    Attributes:
        pid: of the process.
        count: of the process's heartbeats so far.
        phase: what the process does.
        first: round at which it is, or the first of the rounds that it replays.
        last: the last round that it replays; None in other phases.
        longest: the longest time between two heartbeats of the process, in seconds.
        problem: what is wrong, or why the process ended; "" for nothing.
        cause: ``DISK`` or ``ARCHIVE`` if that is why the process ended.
    """

    pid: int
    count: int = 0
    phase: str = STARTING
    first: int = 0
    last: int | None = None
    longest: float = 0.0
    problem: str = ""
    cause: str | None = None


class HeartbeatWriter:
    """Writes the heartbeats of this process; one thread at a time.

    An error of the file is ignored: the process continues, but counts as silent.

    Args:
        path: of the file; None writes nothing.
        clock: returns seconds.
        busy: returns the seconds of processor time that this process has used.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.process_time,
    ) -> None:
        """Write the first heartbeat."""
        self._clock, self._busy = clock, busy
        self._busy_at = busy()
        self._file: int | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._last = Heartbeat(os.getpid())
        self._beat_at = self._written_at = clock()
        self._write()

    def beat(self, phase: str, first: int = 0, last: int | None = None, problem: str = "") -> None:
        """Report that the process is alive; see ``Heartbeat`` for the arguments. Takes about a microsecond."""
        now, before = self._clock(), self._last
        longest = before.longest
        if now - self._beat_at > longest:
            longest = self._measure_silence(now - self._beat_at)
        self._beat_at = now
        self._last = Heartbeat(before.pid, before.count + 1, phase, first, last, longest, problem[:500])
        if phase != before.phase or problem != before.problem or now - self._written_at >= WRITE_SECONDS:
            self._write()

    def _measure_silence(self, seconds: float) -> float:
        """Return the longest silence, with the new one unless the process started or was suspended in it."""
        used, self._busy_at = self._busy() - self._busy_at, self._busy()
        counts = self._last.phase != STARTING and used >= IDLE_SHARE * seconds
        return seconds if counts else self._last.longest

    def end(self, error: BaseException) -> None:
        """Say for which error the process ends: its last heartbeat."""
        cause = DISK if is_disk_full(error) else ARCHIVE if isinstance(error, ArchiveUnreachable) else None
        count, text = self._last.count + 1, f"{type(error).__name__}: {error}"[:500]
        self._last = replace(self._last, count=count, phase=ENDED, last=None, problem=text, cause=cause)
        self._write()

    def _write(self) -> None:
        self._written_at = self._beat_at
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, json.dumps(asdict(self._last)).encode().ljust(SIZE_BYTES), 0)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that no space is left on a disk."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HistoryFull) or (isinstance(found, OSError) and found.errno in NO_SPACE):
            return True
        if RUST_NO_SPACE in str(found):
            return True
        found = found.__cause__ or found.__context__
    return False


def reset_heartbeat(path: Path) -> None:
    """Make the file without a heartbeat, with the space that heartbeats need; the process has not started yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b" " * SIZE_BYTES)


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return the newest heartbeat; None if there is none, or if it is being written right now."""
    try:
        found = json.loads(path.read_bytes())
        return Heartbeat(**found)
    except (OSError, ValueError, TypeError):
        return None
