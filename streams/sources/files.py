"""Tasks as files in a spool folder: write under another name, then rename to ``<id>.safetensors``, .npz or .arrow.

There is no cursor, on purpose: a file that is renamed in later may have an earlier name and an earlier time than
one that was taken already, so "all after the last name or time" would lose it. After a restart all files are offered
again; the history knows the ids that it has. Files that are kept make each listing as long as there are files;
``processed = "move"`` moves each into ``done/`` once it is durable, or into ``rejected/``.
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
"""What the names of task files end with."""


def read_task_file(path: PurePath, data: bytes, spec: TaskSpec, max_bytes: int) -> bytes:
    """Return the content of a task file as a safetensors body; the same content always gives the same bytes.

    Args:
        path: whose ending, one of ``SUFFIXES``, tells the format.
        data: its content.
        spec: what a task looks like.
        max_bytes: how many bytes the tensors may have together.

    Raises:
        Rejected: if it is no file of that format; whether it is a task of the run is left to ``wire.decode``.
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


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in name order per listing."""
    move = settings.processed == "move"
    return Spool(settings.folder, spec, name, settings.poll_seconds, settings.max_bytes, move)
