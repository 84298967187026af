"""Rejected arrivals, kept in a bounded folder so that somebody can look at what came and why it was refused.

Each letter is two files, ``<time>-<number>-<digest>.json`` and ``.body``: what is known of it, and its bytes as they
came, cut where they are many. Nothing that a sender chose is part of a file's name. The oldest go first. A letter is
a courtesy and no promise: where it cannot be written (the disk is full) it is left out, and ingest goes on. Those that
may be the only copy, for a broker is told to forget the message, are synced before it is told.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from streams.atomic_files import sync_path
from streams.types import Arrival, Rejected

LETTER_BYTES = 1024 * 1024
"""How much is kept of one body."""

_ID_CHARACTERS = 500
_SUFFIXES = (".json", ".json.new", ".body")
"""In the order in which they are removed: what is read is what has a head, so that goes first."""
_STEM = re.compile(r"\d{8}T\d{6}\.\d{6}Z-(\d{9,})-[0-9a-f]{16}")
_log = logging.getLogger(__name__)


class _Letter(NamedTuple):
    number: int
    stem: str
    size: int


class DeadLetters:
    """A folder of letters that holds at most so many, of so many bytes together; any thread may write.

    Args:
        folder: made with the first letter. Files in it that are no letters are left alone.
        max_letters: how many letters; 0 keeps none.
        max_bytes: how many bytes of files, the names not counted; 0 keeps none.
        clock: the unix time in seconds that an arrival is noted by.
    """

    def __init__(self, folder: Path, max_letters: int, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Find the letters that are there and drop the oldest of those that are too many."""
        self._folder = folder
        self._max_letters = max_letters
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._failing = False
        self._unsynced: deque[_Letter] = deque(maxlen=max_letters)  # older ones have been dropped
        self._letters: deque[_Letter] = deque()
        self._next_number = 0
        try:
            found = _list_letters(folder)
            self._next_number = found[-1].number + 1 if found else 0
            # What a killed process left unfinished cannot be read, so it makes room before any letter does.
            self._letters.extend(sorted(found, key=lambda letter: self._path(letter, ".json").exists()))
            self._evict_oldest(0, 0)
        except OSError as error:
            self._log_once(error)

    def put(self, arrival: Arrival, rejection: Rejected, *, complete: bool = True, only_copy: bool = False) -> None:
        """Keep what was refused and why; an error of the disk is logged once, and the letter left out.

        Args:
            arrival: what came; its id is data and may be anything.
            rejection: why it was refused.
            complete: whether all of the body was received.
            only_copy: whether its sender will forget it; the next ``sync`` is for it, too.
        """
        if not (self._max_letters and self._max_bytes):
            return
        with self._lock:
            try:
                letter = self._write(arrival, rejection, complete)
                if only_copy and letter is not None:
                    self._unsynced.append(letter)
                self._failing = False
            except OSError as error:
                self._log_once(error)

    def sync(self) -> None:
        """Return when all that were the only copy would survive a power loss; errors are as in ``put``.

        Many are synced one after another here, and not one by one as they come: a file system then writes most of
        them at once, and those that others have driven out not at all.
        """
        with self._sync_lock:  # who comes while another thread syncs must wait until that is done
            with self._lock:
                letters = list(self._unsynced)
                self._unsynced.clear()
            try:
                for letter in letters:
                    with suppress(FileNotFoundError):  # dropped meanwhile
                        for suffix in (".body", ".json"):
                            sync_path(self._path(letter, suffix))
                for folder in (self._folder, self._folder.parent) if letters else ():
                    sync_path(folder)
            except OSError as error:
                self._log_once(error)

    def _write(self, arrival: Arrival, rejection: Rejected, complete: bool) -> _Letter | None:
        now, digest = self._clock(), hashlib.sha256(arrival.body).hexdigest()
        metadata = {
            "reason": rejection.reason,
            "detail": rejection.detail,
            "source": arrival.source,
            "id": arrival.id[:_ID_CHARACTERS],
            "arrived": now,
            "sha256": digest,
            "received_bytes": len(arrival.body),
        }
        kept_bytes = min(len(arrival.body), LETTER_BYTES)
        head = json.dumps(
            {**metadata, "kept_bytes": kept_bytes, "cut": kept_bytes < len(arrival.body) or not complete}, indent=1
        ).encode()
        size = len(head) + kept_bytes
        if size > self._max_bytes:
            return None
        self._evict_oldest(1, size)
        timestamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        letter = _Letter(self._next_number, f"{timestamp}-{self._next_number:09}-{digest[:16]}", size)
        self._next_number += 1
        self._letters.append(letter)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path(letter, ".body").write_bytes(memoryview(arrival.body)[:kept_bytes])
            self._path(letter, ".json.new").write_bytes(head)
            os.replace(self._path(letter, ".json.new"), self._path(letter, ".json"))
        except OSError:
            with suppress(OSError):  # what could not be removed is still counted, and goes as the oldest some day
                self._remove(letter)
                self._letters.remove(letter)
            raise
        return letter

    def _evict_oldest(self, count: int, size: int) -> None:
        """Drop the oldest until so many more letters of so many bytes fit in."""
        total_bytes = sum(letter.size for letter in self._letters)
        while self._letters and (
            len(self._letters) + count > self._max_letters or total_bytes + size > self._max_bytes
        ):
            self._remove(self._letters[0])
            total_bytes -= self._letters.popleft().size

    def _remove(self, letter: _Letter) -> None:
        for suffix in _SUFFIXES:
            self._path(letter, suffix).unlink(missing_ok=True)

    def _path(self, letter: _Letter, suffix: str) -> Path:
        return self._folder / (letter.stem + suffix)

    def _log_once(self, error: OSError) -> None:
        if not self._failing:
            _log.warning("rejected tasks cannot be kept in %s: %s", self._folder, error)
        self._failing = True


def read_letters(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield what is known of each letter in the folder, oldest first, with the path of its bytes.

    Raises:
        OSError: if the folder cannot be read.
    """
    for letter in _list_letters(folder):
        head = folder / f"{letter.stem}.json"
        with suppress(FileNotFoundError):  # it was never finished, or has been dropped meanwhile
            yield head.with_suffix(".body"), json.loads(head.read_bytes())


def _list_letters(folder: Path) -> list[_Letter]:
    """Return the letters of a folder in the order in which they were written; those of a killed process, too."""
    found: dict[str, _Letter] = {}
    try:
        with os.scandir(folder) as listing:
            for item in listing:
                stem = next((item.name.removesuffix(end) for end in _SUFFIXES if item.name.endswith(end)), "")
                known = _STEM.fullmatch(stem)
                if known is not None and item.is_file(follow_symlinks=False):
                    size = found[stem].size if stem in found else 0
                    found[stem] = _Letter(int(known[1]), stem, size + item.stat(follow_symlinks=False).st_size)
    except FileNotFoundError:
        return []
    return sorted(found.values())
