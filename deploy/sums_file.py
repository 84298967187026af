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

from online_meta.sums import RunningSum, add_values
from streams.durable import replace_file

VERSION = 1
MAX_UNWRITTEN_ROWS = 4096


class Rows(NamedTuple):
    """How many rows are in the file, and those behind them, which are not yet; replaced as one."""

    written: int
    unwritten: list[NDArray[np.float64]]


class RunningSumsFile:
    """Implements ``RunningSums``: rows of 8 bytes a column in ``path``, and beside it, in JSON, how many are to be trusted.

    ``should_write()`` says that ``write`` is due: what is not written is in memory. One thread at a time appends and
    writes, any may read.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        """Go on with what is in the file, or begin before round 0 when it has other columns or cannot be read."""
        self.columns = tuple(columns)
        self._path, self._header_path = path, path.with_name(path.name + ".json")
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._restore(json.loads(self._header_path.read_bytes()))

    def _restore(self, header: Mapping[str, Any]) -> None:
        written, running = int(header["rounds"]), [RunningSum(*map(float, pair)) for pair in header["sums"]]
        same = header["version"] == VERSION and tuple(header["columns"]) == self.columns
        if same and len(running) == len(self.columns) and self._path.stat().st_size >= written * self._row_bytes:
            self._rows, self._running = Rows(written, []), running

    @property
    def _row_bytes(self) -> int:
        return 8 * len(self.columns)

    def __len__(self) -> int:
        """How many rounds are summed."""
        return self._rows.written + len(self._rows.unwritten)

    def clear(self) -> None:
        """Begin anew before round 0."""
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.unwritten.append(np.array([one.value() for one in self._running]))

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns).

        Raises ``OSError`` when the file cannot be read.
        """
        found = np.zeros((len(rounds), len(self.columns)))
        written, unwritten = self._rows
        with contextlib.ExitStack() as open_files:
            file = open_files.enter_context(open(self._path, "rb")) if written else None
            for at, round in enumerate(rounds):
                if round > written:
                    found[at] = unwritten[round - written - 1]
                elif round and file is not None:
                    found[at] = np.frombuffer(os.pread(file.fileno(), self._row_bytes, (round - 1) * self._row_bytes))
        return found

    def should_write(self) -> bool:
        """Say whether there is much to write."""
        return len(self._rows.unwritten) >= MAX_UNWRITTEN_ROWS

    def write(self) -> None:
        """Write what is in memory; the lines of its rounds have to be durable. Raises ``OSError`` when it can't be."""
        before, unwritten = self._rows
        if not unwritten:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.seek(before * self._row_bytes)
            file.write(np.stack(unwritten).tobytes())
            file.flush()
            os.fsync(file.fileno())
        written = before + len(unwritten)
        header = {"version": VERSION, "columns": self.columns, "rounds": written, "sums": self._running}
        replace_file(self._header_path, json.dumps(header).encode(), durable=True)
        self._rows = Rows(written, [])
