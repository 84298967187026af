"""A spool folder: listed again and again, each file offered once, moved away when it is settled."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streams.arrivals import Arrival, Rejected
from streams.spec import TaskSpec
from streams.tensor_files import SUFFIXES, read_task_file

_log = logging.getLogger(__name__)
_File = tuple[str, int]  # name and inode, so that one that was replaced is another


@dataclass
class Spool:
    """A ``TaskSource`` over a folder.

    Attributes:
        folder: where the files appear.
        spec: what a task looks like.
        name: of the source.
        poll_seconds: how often it is listed.
        max_bytes: a larger file is not read.
        moves: whether a settled file is moved away.
        clock: seconds, never backwards.
    """

    folder: str
    spec: TaskSpec
    name: str
    poll_seconds: float
    max_bytes: int
    moves: bool
    clock: Callable[[], float] = time.monotonic
    _offered: dict[str, _File] = field(default_factory=dict)

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield each file once per reading, None when there is no more; raises ``OSError`` without the folder."""
        seen, failed = set[_File](), set[_File]()
        self._offered.clear()
        while True:
            listed, now = self.clock(), _list(self.folder)
            waiting = set[_File]()
            for file in sorted(now - seen):
                if self._offered.get(Path(file[0]).stem, file) != file:
                    waiting.add(file)  # another file of the same id is not settled yet
                    continue
                arrival = self._read_file(file, failed)
                if arrival is not None:
                    if self.moves:
                        self._offered[arrival.id] = file
                    yield arrival
            seen = now - failed - waiting
            yield None
            while self.clock() - listed < self.poll_seconds:
                yield None

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Move the files of arrivals that are durable, or were refused for good, out of the way."""
        for arrival in arrivals:
            file = self._offered.pop(arrival.id, None)
            if file is None:
                continue
            path = Path(self.folder, file[0])
            try:
                _move(path, file[1], "done" if arrival.rejection is None else "rejected")
            except FileNotFoundError:
                continue  # somebody else has taken it away
            except OSError as error:
                _log.warning("%s is done with and cannot be moved away: %s", path, error)

    def _read_file(self, file: _File, failed: set[_File]) -> Arrival | None:
        """Return a file as an arrival; None, and it is among the failed, while it cannot be read."""
        path = Path(self.folder, file[0])
        try:
            data = _read(path, self.max_bytes)
            body, rejection = read_task_file(path, data, self.spec, self.max_bytes), None
        except Rejected as rejected:
            body, rejection = data, rejected
        except (OSError, ImportError) as error:
            if file not in failed and not isinstance(error, FileNotFoundError):
                _log.warning("%s is skipped until it can be read: %s", path, error)
            failed.add(file)
            return None
        failed.discard(file)
        return Arrival(path.stem, body, self.name, None, rejection)


def _move(path: Path, inode: int, folder: str) -> None:
    if path.stat().st_ino != inode:
        return  # it was replaced: the new one is offered by itself
    target = path.parent / folder / path.name
    target.parent.mkdir(exist_ok=True)
    os.rename(path, target.with_name(f"{path.stem}.{inode}{path.suffix}") if target.exists() else target)


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(f"it is larger than max_bytes = {max_bytes}")
    return data


def _list(folder: str) -> set[_File]:
    """Return (name, inode) of each task file."""
    try:
        listing = os.scandir(folder)
    except FileNotFoundError as error:
        message = "there is no such folder: make it, or set `folder` to the one that tasks are renamed into"
        raise FileNotFoundError(error.errno, message, folder) from error
    with listing:
        files = [item for item in listing if item.name.endswith(SUFFIXES) and not item.name.startswith(".")]
    return {(item.name, item.inode()) for item in files if item.is_file()}
