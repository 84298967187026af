"""Read tasks from files in a spool folder; writers rename finished files to ``<id>.safetensors``, .npz or .arrow.

This source has no cursor: a file that appears later may have an earlier name and time than one already read, so
"everything after the last name or time" would miss it. After a restart all files are offered again, and the history
recognises the ids that it has. Each listing takes time proportional to the number of files in the folder;
``processed = "move"`` moves each file to ``done/`` once its task is durable, or to ``rejected/``.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt
from safetensors.numpy import save

from streams.formats.arrow import read_arrow
from streams.formats.npz import read_npz
from streams.formats.safetensors_header import Array
from streams.spec import TaskSpec
from streams.types import Arrival, Rejected, TaskSource

SUFFIXES = (".safetensors", ".npz", ".arrow")
"""The suffixes of task files."""


def read_task_file(path: PurePath, data: bytes, spec: TaskSpec, max_bytes: int) -> bytes:
    """Convert the content of a task file to a safetensors body; equal contents give equal bytes.

    Args:
        path: the path of the file; its suffix, one of ``SUFFIXES``, determines the format.
        data: the content of the file.
        spec: the shape and dtypes of the run's tasks.
        max_bytes: the largest total size of the tensors in bytes.

    Raises:
        Rejected: if the content does not have the format; ``wire.decode`` later checks that it is a task of the run.
        ImportError: if the package that reads the format is not installed.
    """
    if path.suffix == ".npz":
        return _encode(read_npz(data, max_bytes))
    if path.suffix == ".arrow":
        return _encode(read_arrow(data, spec))
    return data


def _encode(arrays: dict[str, Array]) -> bytes:
    named: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in arrays.items():
        if values.dtype.name not in _DTYPES:
            raise Rejected("wrong_dtype", f"{name[:80]!r} has dtype {values.dtype.name}; safetensors cannot hold it")
        named[name] = np.ascontiguousarray(values)
    return save(named)


_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float16", "float32", "float64"}


_log = logging.getLogger(__name__)


_File = tuple[str, int]  # name and inode, so that a replaced file counts as a new one


@dataclass
class Spool:
    """A ``TaskSource`` that reads the files of a folder.

    Attributes:
        folder: the folder in which files appear.
        spec: the shape and dtypes of the run's tasks.
        name: the name of the source.
        poll_seconds: the interval between two listings.
        max_bytes: the size of the largest file that is read.
        moves: whether files of acknowledged tasks are moved.
        clock: a monotonic clock in seconds.
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
        """Yield each file once, and None while there is no new file; raise ``OSError`` if there is no folder."""
        seen, failed = set[_File](), set[_File]()
        self._offered.clear()
        while True:
            listed, now = self.clock(), _list(self.folder)
            waiting = set[_File]()
            for file in sorted(now - seen):
                if self._offered.get(Path(file[0]).stem, file) != file:
                    waiting.add(file)  # another file with the same id is not acknowledged yet
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
        """Move the files of arrivals that are durable to ``done/``, and those of rejected arrivals to ``rejected/``."""
        for arrival in arrivals:
            file = self._offered.pop(arrival.id, None)
            if file is None:
                continue
            path = Path(self.folder, file[0])
            try:
                _move(path, file[1], "done" if arrival.rejection is None else "rejected")
            except FileNotFoundError:
                continue  # somebody else has moved or deleted it
            except OSError as error:
                _log.warning("%s has been processed but cannot be moved: %s", path, error)

    def _read_file(self, file: _File, failed: set[_File]) -> Arrival | None:
        """Return a file as an arrival; return None and add it to ``failed`` while it cannot be read."""
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
        return  # the file was replaced, and the new one will be offered separately
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
    """Return the name and inode of each task file."""
    try:
        listing = os.scandir(folder)
    except FileNotFoundError as error:
        message = "there is no such folder: create it, or set `folder` to the folder that receives task files"
        raise FileNotFoundError(error.errno, message, folder) from error
    with listing:
        files = [item for item in listing if item.name.endswith(SUFFIXES) and not item.name.startswith(".")]
    return {(item.name, item.inode()) for item in files if item.is_file()}


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "files"``.

    Attributes:
        folder: the folder in which files appear.
        poll_seconds: the interval between two listings.
        max_bytes: the largest size of a file, and of its tensors together.
        processed: "keep" a file in place, or "move" it to ``done/`` or ``rejected/`` in the folder.
    """

    folder: str
    poll_seconds: Annotated[float, Gt(0)] = 0.5
    max_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    processed: Literal["keep", "move"] = "keep"


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in the order of their names within each listing."""
    move = settings.processed == "move"
    return Spool(settings.folder, spec, name, settings.poll_seconds, settings.max_bytes, move)
