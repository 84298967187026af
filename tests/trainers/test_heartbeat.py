"""Heartbeats: what a process writes, and what its reader sees."""

import errno
import os
from pathlib import Path
from threading import Event

import pytest

from streams.history.errors import ArchiveUnreachable, HistoryFull
from streams.history.history import History
from tests.support.runs import SETTINGS, fill, kill, task
from trainers.journal.heartbeat import (
    ARCHIVE,
    DISK,
    ENDED,
    PLAYING,
    REPLAYING,
    SIZE_BYTES,
    STARTING,
    WAITING,
    HeartbeatWriter,
    read_heartbeat,
    reset_heartbeat,
)
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run


class Times:
    """A clock and a counter of processor time that a test sets."""

    def __init__(self) -> None:
        self.now = self.busy = 0.0

    def writer(self, path: Path) -> HeartbeatWriter:
        return HeartbeatWriter(path, lambda: self.now, lambda: self.busy)


def test_a_reader_sees_what_the_process_does_and_its_longest_silence(tmp_path: Path) -> None:
    path, times = tmp_path / "run" / "trainer.heartbeat", Times()
    reset_heartbeat(path)
    assert read_heartbeat(path) is None
    writer = times.writer(path)
    found = read_heartbeat(path)
    assert (found.pid, found.count, found.phase) == (os.getpid(), 0, STARTING)
    times.now = times.busy = 30.0
    writer.beat(REPLAYING, 5, 9)
    found = read_heartbeat(path)
    assert (found.phase, found.first, found.last, found.longest) == (REPLAYING, 5, 9, 0.0), "the start does not count"
    times.now, times.busy = 34.0, 33.0
    writer.beat(PLAYING, 10)
    times.now = 80.0  # It was suspended: it has used no processor time.
    writer.beat(PLAYING, 11)
    found = read_heartbeat(path)
    assert (found.count, found.first, found.last, found.longest) == (3, 11, None, 4.0)


def test_equal_heartbeats_are_written_at_intervals(tmp_path: Path) -> None:
    path, times = tmp_path / "heartbeat", Times()
    writer = times.writer(path)
    writer.beat(WAITING)
    for step in range(1, 20):
        times.now = step * 0.01
        writer.beat(WAITING)
    assert read_heartbeat(path).count == 11, "after 0.1 seconds"
    writer.beat(WAITING, problem="new")
    assert read_heartbeat(path).problem == "new"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DISK),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DISK),
        (HistoryFull("full"), DISK),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DISK),
        (ArchiveUnreachable("s3"), ARCHIVE),
        (OSError(errno.EIO, "Input/output error"), None),
        (IndexError("index out of range"), None),
    ],
)
def test_the_last_heartbeat_says_why_the_process_ended(tmp_path: Path, error: Exception, cause: str | None) -> None:
    writer = HeartbeatWriter(tmp_path / "heartbeat")
    writer.end(error)
    found = read_heartbeat(tmp_path / "heartbeat")
    assert (found.phase, found.cause, found.problem) == (ENDED, cause, f"{type(error).__name__}: {error}")


def test_the_cause_of_an_error_is_found_behind_it(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path / "heartbeat")
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the checkpoint cannot be written") from error
    except RuntimeError as error:
        writer.end(error)
    assert read_heartbeat(tmp_path / "heartbeat").cause == DISK


def test_a_heartbeat_has_a_fixed_size_and_survives_an_unusable_file(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path / "heartbeat")
    writer.beat(WAITING, problem="\N{SNOWMAN}\n" * 10_000)
    assert (tmp_path / "heartbeat").stat().st_size == SIZE_BYTES
    assert read_heartbeat(tmp_path / "heartbeat").phase == WAITING
    (tmp_path / "folder").mkdir()
    HeartbeatWriter(tmp_path / "folder").beat(WAITING)
    assert read_heartbeat(tmp_path / "folder") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1, "unknown": 2}', b"\xff"])
def test_an_incomplete_heartbeat_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heartbeat").write_bytes(content)
    assert read_heartbeat(tmp_path / "heartbeat") is None


class Noting(HeartbeatWriter):
    """Notes the heartbeats."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self.noted: list[tuple[str, int, int | None]] = []

    def beat(self, phase: str, first: int = 0, last: int | None = None, problem: str = "") -> None:
        self.noted.append((phase, first, last))
        super().beat(phase, first, last, problem)


def test_a_trainer_says_which_rounds_it_replays(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    with History.open(files.history, write=True) as history:
        fill(history, [task(seed) for seed in range(6)])
        kill(tmp_path, history, 4)  # It has played four rounds and saved the third.
        noting = Noting(files.heartbeat("trainer"))
        run = open_run(SETTINGS, files, history, heartbeat=noting)
        assert run.round == 3
        play_rounds(run, Event(), until=6)
        close_run(run)
    steps = list(dict.fromkeys(noting.noted))
    assert (REPLAYING, 3, 3) in steps
    assert steps[-1] == (PLAYING, 6, None)
    assert read_heartbeat(files.heartbeat("trainer")).phase == PLAYING
