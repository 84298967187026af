"""Make and read segments: a segment is one Zarr group of rounds, readable with Zarr alone.

    round, arrived, crc, digest     one value per round
    about, about_end                JSON [id, source, cursor] of each round, as concatenated bytes
    header, header_end              the safetensors header of each payload, as concatenated bytes
    support_x, support_x_shape ...  the concatenated values of each tensor over all rounds, and the shapes

Each array is one shard. An inner chunk holds about CHUNK_BYTES, compressed by zstd, with its own crc32c.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store

from streams.history.archive.columns import (
    Column,
    join_columns,
    make_ragged,
    read_slices,
    read_spans,
    split_columns,
)
from streams.history.archive.shards import CHUNK_BYTES
from streams.history.ledger import RoundEntry

FORMAT = 1


class StoredRound(NamedTuple):
    """A round of the history: its metadata and its payload."""

    entry: RoundEntry
    payload: bytes


class UnknownFormat(Exception):
    """The segment has a format that this version cannot read."""


class SegmentArrays(NamedTuple):
    """The ``attributes`` of a segment's group, and its ``arrays`` by name."""

    attributes: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def list_arrays(rounds: Sequence[StoredRound]) -> SegmentArrays:
    """Return the arrays of a segment of rounds in ascending order and of one layout.

    Raises:
        ValueError: if ``wire.encode`` did not write a payload, or a payload has another layout than the first.
    """
    columns = split_columns([stored.payload for stored in rounds])
    entries = [stored.entry for stored in rounds]
    about = make_ragged([json.dumps([entry.id, entry.source, entry.cursor]).encode() for entry in entries])
    arrays: dict[str, NDArray[Any]] = {
        "round": np.array([entry.round for entry in entries], np.int64),
        "arrived": np.array([entry.arrived for entry in entries], np.float64),
        "crc": np.array([entry.crc for entry in entries], np.uint32),
        "digest": np.frombuffer(b"".join(entry.digest for entry in entries), np.uint8).reshape(len(entries), -1),
        "about": about.values,
        "about_end": about.ends,
        "header": columns.headers.values,
        "header_end": columns.headers.ends,
    }
    for column, values in columns.values.items():
        arrays |= {column.name: values, f"{column.name}_shape": columns.shapes[column]}
    return SegmentArrays({"format": FORMAT, "tensors": [list(column) for column in columns.values]}, arrays)


class Segment:
    """A segment open for reading; small arrays are kept in memory, large tensors are read on demand."""

    def __init__(self, store: Store) -> None:
        """Open the segment and read its small arrays.

        Raises:
            UnknownFormat: if the segment has another format.
            FileNotFoundError, ValueError: if the segment is missing or does not read back as written.
        """
        self._group = zarr.open_group(store, mode="r")
        attributes: dict[str, Any] = self._group.attrs.asdict()
        if attributes.get("format") != FORMAT:
            raise UnknownFormat(f"it has format {attributes.get('format')}; this version reads {FORMAT}")
        self._columns = [Column(*named) for named in attributes["tensors"]]
        self.rounds: NDArray[np.int64] = self._read("round")
        self._headers = self._texts("header")
        self._starts = {column: self._find_starts(column) for column in self._columns}
        arrays = {column: self._array(column.name) for column in self._columns}
        # Arrays of at most one chunk, such as labels, are read once and kept.
        self._values: dict[Column, Any] = {
            column: np.asarray(array[...]) if array.nbytes <= CHUNK_BYTES else array for column, array in arrays.items()
        }

    @cached_property
    def memory_bytes(self) -> int:
        """How many bytes of the segment are in memory."""
        starts = [*self._starts.values(), *(value for value in self._values.values() if isinstance(value, np.ndarray))]
        return int(self.rounds.nbytes) + sum(map(len, self._headers)) + sum(int(array.nbytes) for array in starts)

    def payload(self, round: int) -> bytes:
        """Return the payload of a round; raises ``KeyError`` if the segment does not contain it."""
        at = int(np.searchsorted(self.rounds, round))
        if at == len(self.rounds) or self.rounds[at] != round:
            raise KeyError(round)
        return self._payload(at, self._values)

    def payloads(self, rounds: Sequence[int]) -> list[bytes]:
        """Return the payloads of rounds given in ascending order; rounds near each other are read together.

        Raises:
            KeyError: if the segment does not contain one of the rounds.
        """
        places = np.searchsorted(self.rounds, rounds)
        if not np.array_equal(self.rounds[np.minimum(places, len(self.rounds) - 1)], rounds):
            raise KeyError(f"some of {rounds}")
        spans = {column: np.stack([start[places], start[places + 1]], 1) for column, start in self._starts.items()}
        parts_read = {
            c: read_spans(self._values[c], spans[c], CHUNK_BYTES // np.dtype(c.dtype).itemsize) for c in spans
        }
        return [
            join_columns(self._headers[at], {column: parts[number] for column, parts in parts_read.items()})
            for number, at in enumerate(places.tolist())
        ]

    def read_all(self) -> list[StoredRound]:
        """Return all rounds, reading each array once as a whole."""
        values = {column: self._read(column.name) for column in self._columns}
        return [StoredRound(entry, self._payload(at, values)) for at, entry in enumerate(self.entries)]

    @cached_property
    def entries(self) -> list[RoundEntry]:
        """The metadata of the rounds."""
        arrived, crc, digest = self._read("arrived"), self._read("crc"), self._read("digest")
        return [
            RoundEntry(int(self.rounds[at]), id, source, digest[at].tobytes(), int(crc[at]), float(arrived[at]), cursor)
            for at, (id, source, cursor) in enumerate(map(json.loads, self._texts("about")))
        ]

    def _payload(self, at: int, values: dict[Column, Any]) -> bytes:
        parts = {}
        for tensor_slice in read_slices(self._headers[at]):
            start = self._starts[tensor_slice.column]
            parts[tensor_slice.column] = np.asarray(values[tensor_slice.column][int(start[at]) : int(start[at + 1])])
        return join_columns(self._headers[at], parts)

    def _find_starts(self, column: Column) -> NDArray[np.int64]:
        sizes = np.prod(self._read(f"{column.name}_shape"), axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(sizes)])

    def _texts(self, name: str) -> list[bytes]:
        text, ends = self._read(name).tobytes(), self._read(f"{name}_end")
        return [text[first:after] for first, after in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]

    def _read(self, name: str) -> NDArray[Any]:
        return np.asarray(self._array(name)[...])

    def _array(self, name: str) -> "zarr.Array[Any]":
        array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise ValueError(f"{name} is not an array")
        return array
