"""An append-only file of JSON lines that survives kills: written by one process, followed by many."""

import json
import os
from array import array
from pathlib import Path
from typing import Any

from streams.durable import sync_path

Line = dict[str, Any]


class LineWriter:
    """Appends JSON objects to a file; a line that a kill tore is cut off when the file is opened."""

    def __init__(self, path: Path) -> None:
        """Open ``path``, creating it and its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
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
    """Follows such a file: ``refresh`` gives the lines that are new, ``[i]`` any of the lines seen."""

    def __init__(self, path: Path) -> None:
        """Follow ``path``, which need not exist yet. Nothing is read before ``refresh``."""
        self._path = path
        self._starts = array("Q", [0])

    def __len__(self) -> int:
        """How many whole lines have been seen."""
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Line:
        """Return line ``index``, from 0; raises ``IndexError`` past the lines seen."""
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {self._path}, of which {len(self)} are known")
        with open(self._path, "rb") as file:
            file.seek(self._starts[index])
            line: Line = json.loads(file.readline())
            return line

    def refresh(self) -> list[Line]:
        """Return the whole lines that were added since the last call, up to one that a power loss has damaged."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._starts[-1])
            fresh = file.read()
        lines: list[Line] = []
        for text in fresh.splitlines(keepends=True):
            line = _parse(text)
            if line is None:  # The writer cuts the file here when it is opened again.
                break
            lines.append(line)
            self._starts.append(self._starts[-1] + len(text))
        return lines


def _cut_torn_line(path: Path) -> None:
    """Cut the file after its last line that parses: what follows a kill or power loss left half written."""
    if not path.exists():
        return
    whole = 0
    with open(path, "rb") as file:
        for text in file:
            if _parse(text) is None:
                break
            whole += len(text)
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _parse(text: bytes) -> Line | None:
    """Return the object that a line holds, None when the line is torn or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
