"""Read tasks from the files of a spool folder; writers rename finished files to ``<id>.safetensors`` or another suffix.

This source has no cursor: a file that appears later may have an earlier name and time than one already read, so
"everything after the last name or time" would miss it. After a restart all files are offered again, and the history
recognises the ids that it has. Each listing takes time proportional to the number of files in the folder;
``processed = "move"`` moves each file to ``done/`` once its task is durable, or to ``rejected/``.
"""

import csv
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, MinLen
from safetensors.numpy import save

from streams.formats.arrow import read_arrow
from streams.formats.npz import read_npz
from streams.formats.rows import LINES, Row, encode_row, parse_rows
from streams.formats.safetensors_header import Array
from streams.spec import TaskSpec
from streams.types import Arrival, Rejected, TaskSource

SUFFIXES = (".safetensors", ".npz", ".arrow", ".csv", ".jsonl")
"""The suffixes of task files."""


QUERY = "query"
"""The optional column of a file of lines that says whether a row is in the query set: 1 or true, 0 or false."""

LISTED = 20
"""How many of the entries that a source ignores are named."""


def read_task_file(
    path: PurePath,
    data: bytes,
    spec: TaskSpec,
    max_bytes: int,
    x: Sequence[str] = ("x",),
    y: Sequence[str] = ("y",),
) -> bytes:
    """Convert the content of a task file to a safetensors body; equal contents give equal bytes.

    Args:
        path: the path of the file; its suffix, one of ``SUFFIXES``, determines the format.
        data: the content of the file.
        spec: the shape and dtypes of the run's tasks.
        max_bytes: the largest total size of the tensors in bytes.
        x: the columns of a sample, in a file of lines.
        y: the columns of a target.

    Raises:
        Rejected: if the content does not have the format; ``wire.decode`` later checks that it is a task of the run.
        ImportError: if the package that reads the format is not installed.
    """
    if path.suffix == ".npz":
        return _encode(read_npz(data, max_bytes))
    if path.suffix == ".arrow":
        return _encode(read_arrow(data, spec))
    if path.suffix in LINES:
        return _encode(_read_lines(path, data, spec, x, y))
    return data


def _read_lines(path: PurePath, data: bytes, spec: TaskSpec, x: Sequence[str], y: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of a task whose samples are the rows of a file."""
    try:
        rows = parse_rows(path, data, [*x, *y], QUERY)
        queries = [_is_query(row) for row in rows]
        pairs = [encode_row(row, x, y, spec) for row in rows]
    except (ValueError, csv.Error) as error:
        raise Rejected("unreadable", str(error)[:400]) from error
    if not pairs:
        raise Rejected("empty_support", "the file has no rows")
    arrays = {}
    for part, wanted in (("support", False), ("query", True)):
        found = [pair for pair, query in zip(pairs, queries, strict=True) if query == wanted]
        if len({tuple(values.shape for values in pair) for pair in found}) > 1:
            raise Rejected("wrong_shape", "the samples in the rows of the file differ in shape")
        for at, what in enumerate("xy"):
            if found:
                arrays[f"{part}_{what}"] = np.stack([pair[at] for pair in found])
    return arrays


def _is_query(row: Row) -> bool:
    value = "" if row.values is None else str(row.values.get(QUERY, "")).strip().lower()
    if value not in ("", "0", "1", "true", "false"):
        raise ValueError(f"the row at {row.begin} has {QUERY} = {value[:80]!r}; it must be 1 or true, 0 or false")
    return value in ("1", "true")


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
        x: the columns of a sample, in a file of lines.
        y: the columns of a target.
    """

    folder: str
    spec: TaskSpec
    name: str
    poll_seconds: float
    max_bytes: int
    moves: bool
    clock: Callable[[], float] = time.monotonic
    x: Sequence[str] = ("x",)
    y: Sequence[str] = ("y",)
    _offered: dict[str, _File] = field(default_factory=dict)
    _ignored: dict[str, str] = field(default_factory=dict)

    def omissions(self) -> Sequence[str]:
        """Return what the last listing ignored, and why: the first ``LISTED`` entries, and how many more there are."""
        ignored = self._ignored
        found = [f"{name}: {why}" for name, why in sorted(ignored.items())[:LISTED]]
        return [*found, f"and {len(ignored) - LISTED} more"] if len(ignored) > LISTED else found

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield each file once, and None while there is no new file; raise ``OSError`` if there is no folder."""
        seen, failed = set[_File](), set[_File]()
        self._offered.clear()
        while True:
            listed, (now, ignored) = self.clock(), _list(self.folder)
            self._note_ignored(ignored, {name for name, _ in failed})
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

    def _note_ignored(self, ignored: dict[str, str], failed: set[str]) -> None:
        """Log each entry that is ignored from now on, except hidden ones, which may be in the course of writing."""
        for name, why in sorted(ignored.items()):
            if not name.startswith(".") and self._ignored.get(name) != why:
                _log.warning("the source %s ignores %s: %s", self.name, Path(self.folder, name), why)
        unread = "it cannot be read, as the log says; it is tried again"
        self._ignored = {**ignored, **dict.fromkeys(failed, unread)}

    def _read_file(self, file: _File, failed: set[_File]) -> Arrival | None:
        """Return a file as an arrival; return None and add it to ``failed`` while it cannot be read."""
        path = Path(self.folder, file[0])
        try:
            data = _read(path, self.max_bytes)
            body, rejection = read_task_file(path, data, self.spec, self.max_bytes, self.x, self.y), None
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


def _list(folder: str) -> tuple[set[_File], dict[str, str]]:
    """Return the name and inode of each task file, and why each other entry is none."""
    try:
        listing = os.scandir(folder)
    except FileNotFoundError as error:
        message = "there is no such folder: create it, or set `folder` to the folder that receives task files"
        raise FileNotFoundError(error.errno, message, folder) from error
    files, ignored = set[_File](), dict[str, str]()
    with listing:
        for item in listing:
            why = _why_ignored(item)
            if why:
                ignored[item.name] = why
            elif why is None:
                files.add((item.name, item.inode()))
    return files, ignored


def _why_ignored(item: "os.DirEntry[str]") -> str | None:
    """Return why an entry of the folder is no task file, None if it is one; "" for the folders of moved files."""
    if item.name in ("done", "rejected") and item.is_dir():
        return ""
    if item.name.startswith("."):
        return "its name begins with a dot, as while a file is written; rename it when it is complete"
    if item.is_dir():
        return "it is a folder; only files directly in the folder are read"
    if not item.name.endswith(SUFFIXES):
        return f"its name ends with none of {', '.join(SUFFIXES)}"
    return None if item.is_file() else "it is no regular file"


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "files"``.

    Attributes:
        folder: the folder in which files appear.
        poll_seconds: the interval between two listings.
        max_bytes: the largest size of a file, and of its tensors together.
        processed: "keep" a file in place, or "move" it to ``done/`` or ``rejected/`` in the folder.
        x: the columns of a sample in a .csv or .jsonl file, in order, or one column of (nested) lists.
        y: the column of the label, or the columns of the target.
    """

    folder: str
    poll_seconds: Annotated[float, Gt(0)] = 0.5
    max_bytes: Annotated[int, Ge(1)] = 16 * 1024 * 1024
    processed: Literal["keep", "move"] = "keep"
    x: Annotated[tuple[str, ...], MinLen(1)] = ("x",)
    y: Annotated[tuple[str, ...], MinLen(1)] = ("y",)


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the folder's files, in the order of their names within each listing."""
    move = settings.processed == "move"
    return Spool(
        settings.folder, spec, name, settings.poll_seconds, settings.max_bytes, move, x=settings.x, y=settings.y
    )
