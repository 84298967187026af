"""Tasks as files in a spool folder: write under another name, then rename to ``<id>.safetensors``, .npz or .arrow.

There is no cursor, on purpose: a file that is renamed in later may have an earlier name and an earlier time than
one that was taken already, so "all after the last name or time" would lose it. After a restart all files are offered
again; the history knows the ids that it has. Files that are kept make each listing as long as there are files;
``processed = "move"`` moves each into ``done/`` once it is durable, or into ``rejected/``.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from streams.arrivals import Arrival, Rejected, TaskSource
from streams.spec import TaskSpec
from streams.tensor_files import ENDINGS, read_task_file

_log = logging.getLogger(__name__)
_File = tuple[str, int]  # name and inode, so that one that was replaced is another


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "files"``.

    Attributes:
        folder: where the files appear.
        poll_seconds: how often it is listed.
        max_bytes: a larger file is not read; nor one whose tensors are larger.
        processed: "keep" a file where it is, or "move" it into the folder's ``done/`` or ``rejected/``.
    """

    folder: str
    poll_seconds: Annotated[float, Gt(0)] = 0.5
    max_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    processed: Literal["keep", "move"] = "keep"


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in name order per listing."""
    return Spool(settings, spec, name)


@dataclass
class Spool:
    """A ``TaskSource`` over a folder; ``clock`` gives seconds, never backwards."""

    settings: Settings
    spec: TaskSpec
    name: str
    clock: Callable[[], float] = time.monotonic
    _offered: dict[str, _File] = field(default_factory=dict)

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield each file once per reading, None when there is no more; raises ``OSError`` without the folder."""
        seen, failed = set[_File](), set[_File]()
        self._offered.clear()
        while True:
            listed, now = self.clock(), _list(self.settings.folder)
            waiting = set[_File]()
            for file in sorted(now - seen):
                if self._offered.get(Path(file[0]).stem, file) != file:
                    waiting.add(file)  # another file of the same id is not settled yet
                    continue
                arrival = self._read_file(file, failed)
                if arrival is not None:
                    if self.settings.processed == "move":
                        self._offered[arrival.id] = file
                    yield arrival
            seen = now - failed - waiting
            yield None
            while self.clock() - listed < self.settings.poll_seconds:
                yield None

    def settle(self, arrival: Arrival) -> None:
        """Move the file of an arrival that is durable, or was refused for good, out of the way."""
        file = self._offered.pop(arrival.id, None)
        if file is None:
            return
        path = Path(self.settings.folder, file[0])
        if path.stat().st_ino != file[1]:
            return  # it was replaced: the new one is offered by itself
        folder = path.parent / ("done" if arrival.refused is None else "rejected")
        folder.mkdir(exist_ok=True)
        target = folder / path.name
        os.rename(path, folder / f"{path.stem}.{file[1]}{path.suffix}" if target.exists() else target)

    def _read_file(self, file: _File, failed: set[_File]) -> Arrival | None:
        """Return a file as an arrival; None, and it is among the failed, while it cannot be read."""
        path = Path(self.settings.folder, file[0])
        try:
            data = _read(path, self.settings.max_bytes)
            body, refused = read_task_file(path, data, self.spec, self.settings.max_bytes), None
        except Rejected as refusal:
            body, refused = data, refusal
        except (OSError, ImportError) as error:
            if file not in failed and not isinstance(error, FileNotFoundError):
                _log.warning("%s is skipped until it can be read: %s", path, error)
            failed.add(file)
            return None
        failed.discard(file)
        return Arrival(path.stem, body, self.name, None, refused)


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"it is larger than max_bytes = {most}")
    return data


def _list(folder: str) -> set[_File]:
    """Return (name, inode) of each task file."""
    with os.scandir(folder) as listing:
        files = [item for item in listing if item.name.endswith(ENDINGS) and not item.name.startswith(".")]
    return {(item.name, item.inode()) for item in files if item.is_file()}
