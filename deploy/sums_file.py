"""Sums over the rounds in a file: a daemon that starts reads what is new, and keeps none of them in memory.

All of it can be made again from the lines of the rounds, so nothing is lost with it; it holds only what those lines
were durable for, and is begun anew where it does not fit them.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_meta.sums import RunningSum, add_up
from streams.durable import replace_file

VERSION = 1
FRESH_ROWS = 4096


class Rows(NamedTuple):
    """How many rows are in the file, and those behind them, which are not yet; replaced as one."""

    written: int
    fresh: list[NDArray[np.float64]]


class SumsFile:
    """Implements ``Sums``: rows of 8 bytes a column in ``path``, and beside it, in JSON, how many are to be trusted.

    ``must_write()`` says that ``write`` is due: what is not written is in memory. One thread at a time appends and
    writes, any may read.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        """Go on with what is in the file, or begin before round 0 when it has other columns or cannot be read."""
        self.columns = tuple(columns)
        self._path, self._note = path, path.with_name(path.name + ".json")
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._take_up(json.loads(self._note.read_bytes()))

    def _take_up(self, note: Mapping[str, Any]) -> None:
        written, running = int(note["rounds"]), [RunningSum(*map(float, pair)) for pair in note["sums"]]
        same = note["version"] == VERSION and tuple(note["columns"]) == self.columns
        if same and len(running) == len(self.columns) and self._path.stat().st_size >= written * self._width:
            self._rows, self._running = Rows(written, []), running

    @property
    def _width(self) -> int:
        return 8 * len(self.columns)

    def __len__(self) -> int:
        """How many rounds are summed."""
        return self._rows.written + len(self._rows.fresh)

    def clear(self) -> None:
        """Begin anew before round 0."""
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""
        self._running = add_up(self._running, self.columns, values)
        self._rows.fresh.append(np.array([one.value() for one in self._running]))

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns).

        Raises ``OSError`` when the file cannot be read.
        """
        found = np.zeros((len(rounds), len(self.columns)))
        written, fresh = self._rows
        with contextlib.ExitStack() as open_files:
            file = open_files.enter_context(open(self._path, "rb")) if written else None
            for at, round in enumerate(rounds):
                if round > written:
                    found[at] = fresh[round - written - 1]
                elif round and file is not None:
                    found[at] = np.frombuffer(os.pread(file.fileno(), self._width, (round - 1) * self._width))
        return found

    def must_write(self) -> bool:
        """Say whether there is much to write."""
        return len(self._rows.fresh) >= FRESH_ROWS

    def write(self) -> None:
        """Write what is in memory; the lines of its rounds have to be durable. Raises ``OSError`` when it can't be."""
        before, fresh = self._rows
        if not fresh:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.seek(before * self._width)
            file.write(np.stack(fresh).tobytes())
            file.flush()
            os.fsync(file.fileno())
        written = before + len(fresh)
        note = {"version": VERSION, "columns": self.columns, "rounds": written, "sums": self._running}
        replace_file(self._note, json.dumps(note).encode(), durable=True)
        self._rows = Rows(written, [])
