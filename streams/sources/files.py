"""Tasks as files in a spool folder: write under another name, then rename to ``<id>.safetensors``.

There is no cursor, on purpose: a file that is renamed in later may have an earlier name and an earlier time than
one that was taken already, so "all after the last name or time" would lose it. After a restart all files are offered
again; the history knows the ids that it has. Files are kept: each listing costs as much as there are files.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt

from streams.arrivals import Arrival, TaskSource
from streams.spec import TaskSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "files"``.

    Attributes:
        folder: where the files appear.
        poll_seconds: how often it is listed.
        max_bytes: a larger file is not read.
    """

    folder: str
    poll_seconds: Annotated[float, Gt(0)] = 0.5
    max_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in name order per listing."""
    return Spool(settings, name)


class Spool(NamedTuple):
    """A ``TaskSource`` over a folder; ``clock`` gives seconds, never backwards."""

    settings: Settings
    name: str
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield each file once per reading, None when there is no more; raises ``OSError`` without the folder."""
        seen, failed = set[tuple[str, int]](), set[tuple[str, int]]()
        while True:
            listed, now = self.clock(), _list(self.settings.folder)
            for file in sorted(now - seen):
                path = Path(self.settings.folder, file[0])
                try:
                    if path.stat().st_size > self.settings.max_bytes:
                        raise OSError(f"it is larger than max_bytes = {self.settings.max_bytes}")
                    body = path.read_bytes()
                except OSError as error:
                    if file not in failed and not isinstance(error, FileNotFoundError):
                        _log.warning("%s is skipped until it can be read: %s", path, error)
                    failed.add(file)
                else:
                    failed.discard(file)
                    yield Arrival(path.stem, body, self.name, None)
            seen = now - failed
            yield None
            while self.clock() - listed < self.settings.poll_seconds:
                yield None


def _list(folder: str) -> set[tuple[str, int]]:
    """Return (name, inode) of each task file, so that one that was replaced is offered again."""
    with os.scandir(folder) as listing:
        files = [item for item in listing if item.name.endswith(".safetensors") and not item.name.startswith(".")]
    return {(item.name, item.inode()) for item in files if item.is_file()}
