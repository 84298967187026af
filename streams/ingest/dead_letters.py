"""Keep rejected arrivals in a bounded folder, so that people can inspect what arrived and why it was rejected.

Each dead letter consists of two files: ``<time>-<number>-<digest>.json`` with its metadata, and ``.body`` with its
bytes as received, truncated if they are long. File names contain nothing that a sender chose. The oldest are evicted
first. Dead letters are best effort: if one cannot be written (the disk is full), it is left out and ingest continues.
A letter that may be the only copy, because the broker will forget the message, is synced before the acknowledgement.
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
"""How many bytes of one body are kept."""

_ID_CHARACTERS = 500
_SUFFIXES = (".json", ".json.new", ".body")
"""Suffixes in the order of removal: readers look for the .json file, so it is removed first."""
_STEM = re.compile(r"\d{8}T\d{6}\.\d{6}Z-(\d{9,})-[0-9a-f]{16}")
_log = logging.getLogger(__name__)


class _Letter(NamedTuple):
    number: int
    stem: str
    size: int


class DeadLetters:
    """A bounded folder of dead letters; any thread may write to it.

    Args:
        folder: created with the first letter. Other files in it are left alone.
        max_letters: the largest number of letters; 0 keeps none.
        max_bytes: the largest total size of their files in bytes; 0 keeps none.
        clock: returns the Unix time in seconds, which is recorded as the time of arrival.
    """

    def __init__(self, folder: Path, max_letters: int, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Find existing letters and evict the oldest ones above the limits."""
        self._folder = folder
        self._max_letters = max_letters
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._failing = False
        self._unsynced: deque[_Letter] = deque(maxlen=max_letters)  # older ones have been evicted
        self._letters: deque[_Letter] = deque()
        self._next_number = 0
        try:
            found = _list_letters(folder)
            self._next_number = found[-1].number + 1 if found else 0
            # Letters that a killed process left unfinished cannot be read, so they are evicted first.
            self._letters.extend(sorted(found, key=lambda letter: self._path(letter, ".json").exists()))
            self._evict_oldest(0, 0)
        except OSError as error:
            self._log_once(error)

    def put(self, arrival: Arrival, rejection: Rejected, *, complete: bool = True, only_copy: bool = False) -> None:
        """Keep a rejected arrival; on a disk error, leave it out and log the first of consecutive errors.

        Args:
            arrival: the rejected arrival; its id may be any text.
            rejection: why it was rejected.
            complete: whether the whole body was received.
            only_copy: whether its sender will forget it, so that the next ``sync`` must make the letter durable.
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
        """Make all letters that are the only copy durable; disk errors are handled as in ``put``.

        Letters are synced here in one go instead of when they are written: the file system then writes most of them
        together, and evicted ones not at all.
        """
        with self._sync_lock:  # a second thread must wait until the first has finished syncing
            with self._lock:
                letters = list(self._unsynced)
                self._unsynced.clear()
            try:
                for letter in letters:
                    with suppress(FileNotFoundError):  # evicted in the meantime
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
            **({"evidence": rejection.evidence} if rejection.evidence else {}),
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
            with suppress(OSError):  # a letter that could not be removed still counts and is evicted later
                self._remove(letter)
                self._letters.remove(letter)
            raise
        return letter

    def _evict_oldest(self, count: int, size: int) -> None:
        """Evict the oldest letters until ``count`` more, of ``size`` bytes in total, fit."""
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
    """Yield the path of the body and the metadata of each letter in a folder, oldest first.

    Raises:
        OSError: if the folder cannot be read.
    """
    for letter in _list_letters(folder):
        head = folder / f"{letter.stem}.json"
        with suppress(FileNotFoundError):  # it was never finished, or has been evicted in the meantime
            yield head.with_suffix(".body"), json.loads(head.read_bytes())


def _list_letters(folder: Path) -> list[_Letter]:
    """Return the letters of a folder in the order of writing, including unfinished letters of a killed process."""
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
