"""Append-only files of JSON lines that survive kills: one process writes, any number of processes follow."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from streams.atomic_files import sync_path

BATCH_BYTES = 1 << 18
Line = dict[str, Any]


class LineWriter:
    """A writer that appends JSON objects to a file; opening it removes an incomplete last line.

    Args:
        path: of the file; it and its folder are created if they do not exist.
        whole_bytes: length of a prefix that is known to be complete lines.
    """

    def __init__(self, path: Path, whole_bytes: int = 0) -> None:
        """Open the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate_torn_line(path, whole_bytes)
        self._file = open(path, "ab")  # noqa: SIM115 - held until close()
        self._is_synced = False  # An earlier process may have been killed before it made its lines durable.
        sync_path(path.parent)

    def append(self, line: Line) -> None:
        """Append one object; raises ``ValueError`` for NaN or infinity, which are not JSON."""
        text = json.dumps(line, allow_nan=False, separators=(",", ":"))
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        self._is_synced = False

    def sync(self) -> None:
        """Make all lines durable, so that they survive a power loss; this costs nothing if they are already."""
        if not self._is_synced:
            self._is_synced = True  # A line that another thread appends meanwhile needs a further call.
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LineReader:
    """A reader that follows a file of JSON lines; ``position`` is the end, in bytes, of the last line returned.

    Args:
        path: of the file, which need not exist yet.
        position: where to start, in bytes.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        """Start at ``position``; nothing is read yet."""
        self._path = path
        self.position = position

    def lines(self) -> Iterator[Line]:
        """Yield the new complete lines, up to the first damaged one; the file is read in batches."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self.position)
            while texts := file.readlines(BATCH_BYTES):
                for text in texts:
                    line = parse_line(text)
                    if line is None:  # The next writer truncates the file here.
                        return
                    self.position += len(text)
                    yield line

    def refresh(self) -> list[Line]:
        """Return the new lines, all at once."""
        return list(self.lines())


def read_line(path: Path, position: int) -> tuple[Line, int] | None:
    """Return the line at byte ``position`` and the position of the next line; None if no complete line is there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(position)
        text = file.readline()
        line = parse_line(text)
        return None if line is None else (line, position + len(text))
    return None


def read_last_line(path: Path) -> Line | None:
    """Return the last complete line of a file, of which only the end is read; None if there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        size, length = file.seek(0, os.SEEK_END), BATCH_BYTES
        while size:
            start = max(size - length, 0)
            file.seek(start)
            texts = file.read(size - start).splitlines(keepends=True)[start > 0 :]
            found = next((line for line in map(parse_line, reversed(texts)) if line is not None), None)
            if found is not None or start == 0:
                return found
            length *= 4
    return None


def find_line(path: Path, reached: Callable[[Line], bool]) -> int:
    """Find the first line for which ``reached`` is true, by binary search.

    Args:
        path: of the file.
        reached: false for the lines before the one to find, true for all lines from it on. A damaged line counts as
            reached.

    Returns:
        The position of the line, in bytes; the size of the file if there is no such line.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        found = high = path.stat().st_size
        low = 0  # Lines that begin before ``low`` are not reached; lines from ``found`` on are.
        while low < high:
            middle = (low + high) // 2
            start = _seek_line_start(file, middle, low)
            if start >= high:
                high = middle
                continue
            text = file.readline()
            line = parse_line(text)
            if line is None or reached(line):
                found = high = start
            else:
                low = start + len(text)
        return found


def _seek_line_start(file: BinaryIO, middle: int, low: int) -> int:
    """Seek to the first line that begins at ``middle`` or later, and return its position; a line begins at ``low``."""
    if middle > low:
        file.seek(middle - 1)
        file.readline()
    else:
        file.seek(low)
    return file.tell()


def _truncate_torn_line(path: Path, whole_bytes: int) -> None:
    """Truncate the file after its last complete line; a kill or power loss can leave an incomplete one."""
    if not path.exists():
        return
    reader = LineReader(path, whole_bytes)
    for _ in reader.lines():
        pass
    if reader.position < path.stat().st_size:
        os.truncate(path, reader.position)


def parse_line(text: bytes) -> Line | None:
    """Return the object of a line; None if the line is incomplete or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
