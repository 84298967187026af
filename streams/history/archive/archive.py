"""Write, publish and read segments; a segment exists once its marker does."""

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streams.history.archive import BlobStore, FileChecksum
from streams.history.archive.segment import FORMAT, Segment, StoredRound, UnknownFormat, list_arrays
from streams.history.archive.shards import write_group
from streams.history.errors import ArchiveUnreachable, HistoryDamaged, HistoryFormatError

SEGMENTS = "segments"
MARKERS = "markers"
OPEN_BYTES = 64 * 1024 * 1024
"""The memory limit for open segments; opening a segment costs as much as reading many of its rounds."""


@dataclass(frozen=True)
class Marker:
    """The description of a published segment.

    Attributes:
        name: the name of the segment.
        first: its first round.
        last: its last round.
        count: the number of its rounds; it may lack rounds between ``first`` and ``last``.
        files: the checksums of its files by path.
    """

    name: str
    first: int
    last: int
    count: int
    files: dict[str, FileChecksum]

    @property
    def bytes(self) -> int:
        """The total size of its files in bytes."""
        return sum(file.bytes for file in self.files.values())


class Archive:
    """The segments in a store, for any number of readers and one writer; the caller must ensure a single writer."""

    def __init__(self, store: BlobStore) -> None:
        """Take the store; nothing is read yet."""
        self._store = store
        self.unreachable_errors = store.unreachable_errors
        self._open: OrderedDict[str, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def publish(self, rounds: Sequence[StoredRound]) -> Marker:
        """Write a segment, make it durable, read it back, and publish it with a marker.

        Args:
            rounds: the rounds of the segment, at least one, in ascending order and of one layout.

        Raises:
            HistoryDamaged: if the segment does not read back as written; it is then not published.
            ArchiveUnreachable: if the object store cannot be reached.
            OSError: if the disk is full.
        """
        first, last = rounds[0].entry.round, rounds[-1].entry.round
        with translate_segment_errors(f"of rounds {first} to {last}", self.unreachable_errors):
            name = self._new_name(first, last)
            path = f"{SEGMENTS}/{name}"
            self._store.remove(path)
            files = write_group(self._store, path, *list_arrays(rounds))
            marker = Marker(name, first, last, len(rounds), files)
            self._store.put(f"{MARKERS}/{name}.json", _write_marker(marker))
        return marker

    def _new_name(self, first: int, last: int) -> str:
        taken, number = set(self._store.names(MARKERS)), 0
        while f"{(name := f'{first:012d}-{last:012d}-{number}')}.json" in taken:
            number += 1
        return name

    def names(self) -> list[str]:
        """Return the names of the published segments, ordered by their first rounds."""
        return [name.removesuffix(".json") for name in self._store.names(MARKERS) if name.endswith(".json")]

    def marker(self, name: str) -> Marker:
        """Return the marker of a segment.

        Raises:
            HistoryDamaged: if the marker is missing or differs from what was written.
            HistoryFormatError: if a later version wrote it.
            ArchiveUnreachable: if the object store cannot be reached.
        """
        with translate_segment_errors(name, self.unreachable_errors):
            return _read_marker(self._store.get(f"{MARKERS}/{name}.json"), name)

    def segment(self, name: str) -> Segment:
        """Open a published segment for reading; the most recently used segments stay open.

        Raises:
            HistoryDamaged: if the segment is missing or differs from what was written.
            HistoryFormatError: if a later version wrote it.
            ArchiveUnreachable: if the object store cannot be reached.
        """
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
        path = f"{SEGMENTS}/{name}"
        sizes = {file: expected.bytes for file, expected in self.marker(name).files.items()}
        with translate_segment_errors(name, self.unreachable_errors):
            if wrong := _describe_differences(sizes, self._store.sizes(path)):
                raise ValueError("; ".join(wrong))
            segment = Segment(self._store.zarr_store(path))
        with self._lock:
            self._open[name] = segment
            open_bytes = sum(one.memory_bytes for one in self._open.values())
            while open_bytes > OPEN_BYTES and len(self._open) > 1:
                open_bytes -= self._open.popitem(last=False)[1].memory_bytes
        return segment

    def payload(self, name: str, round: int) -> bytes:
        """Return the payload of one round of a segment; raises as ``segment`` does."""
        segment = self.segment(name)
        with translate_segment_errors(name, self.unreachable_errors):
            return segment.payload(round)

    def payloads(self, name: str, rounds: Sequence[int]) -> list[bytes]:
        """Return the payloads of rounds of one segment, given in ascending order; raises as ``segment`` does."""
        segment = self.segment(name)
        with translate_segment_errors(name, self.unreachable_errors):
            return segment.payloads(rounds)

    def read_all(self, name: str) -> list[StoredRound]:
        """Return all rounds of a segment; raises as ``segment`` does."""
        segment = self.segment(name)
        with translate_segment_errors(name, self.unreachable_errors):
            return segment.read_all()

    def check_files(self, marker: Marker) -> list[str]:
        """Return the faults of a segment's files: each file that is missing, unexpected or damaged."""
        with translate_segment_errors(marker.name, self.unreachable_errors):
            found = self._store.files(f"{SEGMENTS}/{marker.name}")
        return _describe_differences(marker.files, found)

    def discard(self, name: str) -> None:
        """Delete a segment: first its marker, then its files."""
        self._store.remove(f"{MARKERS}/{name}.json")
        self._store.remove(f"{SEGMENTS}/{name}")
        with self._lock:
            self._open.pop(name, None)

    def remove_orphans(self) -> None:
        """Remove the files of unpublished segments, which a killed writer left behind."""
        published = set(self.names())
        for name in self._store.names(SEGMENTS):
            if name not in published:
                self._store.remove(f"{SEGMENTS}/{name}")


def _describe_differences(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    gone = [f"{name} is missing" for name in expected if name not in found]
    new = [f"{name} is not one of its files" for name in found if name not in expected]
    return [
        *gone,
        *new,
        *(f"{name} is damaged" for name in expected if name in found and found[name] != expected[name]),
    ]


@contextlib.contextmanager
def translate_segment_errors(name: str, unreachable_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Translate errors of Zarr and the store about an unreadable segment into errors that name the segment."""
    try:
        yield
    except FileNotFoundError as error:
        raise HistoryDamaged(f"the segment {name} lacks a file: {error}") from error
    except unreachable_errors as error:
        raise ArchiveUnreachable(f"the segment {name} cannot be reached: {error}") from error
    except UnknownFormat as error:
        raise HistoryFormatError(f"the segment {name}: {error}; it is left untouched") from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise HistoryDamaged(f"the segment {name} cannot be read: {type(error).__name__}: {error}") from error


def _write_marker(marker: Marker) -> bytes:
    files = {name: file._asdict() for name, file in sorted(marker.files.items())}
    content = {"format": FORMAT, "first": marker.first, "last": marker.last, "count": marker.count, "files": files}
    return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode()


def _read_marker(data: bytes, name: str) -> Marker:
    try:
        content = json.loads(data)
        digest = content.pop("sha256")
        version = content["format"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise HistoryDamaged(f"the marker of the segment {name} is damaged: {error}") from error
    if version != FORMAT:
        raise HistoryFormatError(f"the segment {name} has format {version}; this version reads {FORMAT}")
    if digest != _digest(content):
        raise HistoryDamaged(f"the marker of the segment {name} is damaged: its SHA-256 does not match its content")
    files = {file: FileChecksum(**values) for file, values in content["files"].items()}
    return Marker(name, content["first"], content["last"], content["count"], files)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
