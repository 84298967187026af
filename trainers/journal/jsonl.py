"""An append-only file of JSON lines that survives kills: written by one process, followed by many."""

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
    """Appends JSON objects to a file; a line that a kill tore is cut off when the file is opened."""

    def __init__(self, path: Path, whole_bytes: int = 0) -> None:
        """Open ``path``, or create it and its folder; its first ``whole_bytes`` bytes are complete lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate_torn_line(path, whole_bytes)
        self._file = open(path, "ab")  # noqa: SIM115 - held until close()
        sync_path(path.parent)

    def append(self, line: Line) -> None:
        """Append one object; raises ``ValueError`` for NaN or infinity, which are no JSON."""
        text = json.dumps(line, allow_nan=False, separators=(",", ":"))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when all that was appended would survive a power loss."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LineReader:
    """Follows such a file from a ``position`` on, in bytes: that behind the last line that was given."""

    def __init__(self, path: Path, position: int = 0) -> None:
        """Follow ``path``, which need not exist yet. Nothing is read before ``lines``."""
        self._path = path
        self.position = position

    def lines(self) -> Iterator[Line]:
        """Give the whole lines that are new one by one, up to one that a power loss has damaged; few are in memory."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self.position)
            while texts := file.readlines(BATCH_BYTES):
                for text in texts:
                    line = _parse(text)
                    if line is None:  # The writer cuts the file here when it is opened again.
                        return
                    self.position += len(text)
                    yield line

    def refresh(self) -> list[Line]:
        """Return the new lines, all at once."""
        return list(self.lines())


def read_line(path: Path, position: int) -> tuple[Line, int] | None:
    """Return the line that begins at ``position``, and where the next one does; None when none is whole there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(position)
        text = file.readline()
        line = _parse(text)
        return None if line is None else (line, position + len(text))
    return None


def find_line(path: Path, reached: Callable[[Line], bool]) -> int:
    """Return where the first line that is ``reached`` begins: behind all lines if none is.

    The lines that are come behind all that are not; so few are read, however long the file is. One that is not whole
    counts as reached: nothing behind it is to be read.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        found = high = path.stat().st_size
        low = 0  # Lines that begin before it are not reached, those that begin at ``found`` or behind it are.
        while low < high:
            middle = (low + high) // 2
            start = _seek_line_start(file, middle, low)
            if start >= high:
                high = middle
                continue
            text = file.readline()
            line = _parse(text)
            if line is None or reached(line):
                found = high = start
            else:
                low = start + len(text)
        return found


def _seek_line_start(file: BinaryIO, middle: int, low: int) -> int:
    """Go to the first line that begins at ``middle`` or behind it; one begins at ``low``."""
    if middle > low:
        file.seek(middle - 1)
        file.readline()
    else:
        file.seek(low)
    return file.tell()


def _truncate_torn_line(path: Path, whole_bytes: int) -> None:
    """Cut the file after its last line that parses: what follows a kill or power loss left half written."""
    if not path.exists():
        return
    reader = LineReader(path, whole_bytes)
    for _ in reader.lines():
        pass
    if reader.position < path.stat().st_size:
        os.truncate(path, reader.position)


def _parse(text: bytes) -> Line | None:
    """Return the object that a line holds, None when the line is torn or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
