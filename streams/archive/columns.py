"""Kept payloads <-> columns: ragged tasks side by side without padding, each tensor in its own dtype.

A payload is a safetensors body: the length of its header in 8 bytes, the header, the tensors' bytes one behind the
other. Here the headers make one column and each tensor another; put together again they are the same bytes, whatever
version of safetensors wrote them.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


class Column(NamedTuple):
    """A tensor's name, its dtype as NumPy names it, and how many dimensions it has."""

    name: str
    dtype: str
    rank: int


class Piece(NamedTuple):
    """Where a tensor lies in the data of one payload: bytes ``first`` to ``after`` (excluded), and its shape."""

    column: Column
    shape: tuple[int, ...]
    first: int
    after: int


class Ragged(NamedTuple):
    """Arrays of differing lengths, one behind the other; array i is ``values[ends[i - 1]:ends[i]]``."""

    values: NDArray[np.generic]
    ends: NDArray[np.int64]


class Columns(NamedTuple):
    """Payloads as columns: the headers' bytes, and of each tensor the values and the shapes, (payloads, rank)."""

    headers: Ragged
    values: dict[Column, NDArray[np.generic]]
    shapes: dict[Column, NDArray[np.int64]]


def layout(payload: bytes) -> frozenset[Column]:
    """Return which columns a payload has; payloads of one segment have the same.

    Raises:
        ValueError: if it is no body of tensors one behind the other, of the known dtypes.
    """
    return frozenset(piece.column for piece in read_pieces(_header(payload)))


@lru_cache(maxsize=1024)
def read_pieces(header: bytes) -> tuple[Piece, ...]:
    """Return where the tensors lie that a header tells of, in the order of their bytes.

    Raises:
        ValueError: as ``layout`` does.
    """
    try:
        said = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        pieces = [_piece(name, value) for name, value in said.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a header of safetensors: {error!r}") from error
    pieces.sort(key=lambda piece: (piece.first, piece.after))
    end = 0
    for piece in pieces:
        size = int(np.prod(piece.shape, dtype=np.int64)) * np.dtype(piece.column.dtype).itemsize
        if piece.first != end or piece.after != end + size:
            raise ValueError(f"the tensor {piece.column.name!r} does not lie right behind the one before it")
        end = piece.after
    return tuple(pieces)


def _piece(name: str, said: dict[str, object]) -> Piece:
    shape, offsets = said["shape"], said["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"of the tensor {name!r}")
    column = Column(name, _DTYPES[str(said["dtype"])], len(shape))
    return Piece(column, tuple(shape), *offsets)


def take_apart(payloads: Sequence[bytes]) -> Columns:
    """Return payloads of one layout as columns.

    Raises:
        ValueError: if one is not a body of tensors, or of another layout than the first.
    """
    headers = [_header(payload) for payload in payloads]
    columns = sorted(layout(payloads[0]))
    values: dict[Column, list[NDArray[np.generic]]] = {column: [] for column in columns}
    shapes: dict[Column, list[tuple[int, ...]]] = {column: [] for column in columns}
    for payload, header in zip(payloads, headers, strict=True):
        pieces = read_pieces(header)
        begin = 8 + len(header)
        if len(payload) != begin + (pieces[-1].after if pieces else 0) or {p.column for p in pieces} != set(columns):
            raise ValueError("payloads of differing layouts cannot lie in one segment")
        for piece in pieces:
            count = (piece.after - piece.first) // np.dtype(piece.column.dtype).itemsize
            values[piece.column].append(np.frombuffer(payload, piece.column.dtype, count, begin + piece.first))
            shapes[piece.column].append(piece.shape)
    return Columns(
        make_ragged(headers),
        {column: np.concatenate(parts) for column, parts in values.items()},
        {column: np.array(parts, np.int64).reshape(len(payloads), column.rank) for column, parts in shapes.items()},
    )


def put_together(header: bytes, parts: dict[Column, NDArray[np.generic]]) -> bytes:
    """Return the payload with this header and these values of each tensor."""
    pieces = read_pieces(header)
    return b"".join([len(header).to_bytes(8, "little"), header, *(parts[piece.column].tobytes() for piece in pieces)])


def read_spans(values: Any, spans: NDArray[np.int64], near: int) -> list[NDArray[np.generic]]:
    """Return ``values[first:after]`` of each of the spans, (n, 2) and ascending.

    Those that are less than ``near`` apart are read at once, for a read costs much and each value little.
    """
    found: list[NDArray[np.generic]] = []
    cuts = np.flatnonzero(spans[1:, 0] - spans[:-1, 1] >= near) + 1
    for together in np.split(spans, cuts):
        begin = int(together[0, 0])
        read = np.asarray(values[begin : int(together[-1, 1])])
        found += [read[first - begin : after - begin] for first, after in together.tolist()]
    return found


def make_ragged(texts: Sequence[bytes]) -> Ragged:
    """Return byte strings one behind the other."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return Ragged(np.frombuffer(b"".join(texts), np.uint8), ends)


def _header(payload: bytes) -> bytes:
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > len(payload) - 8:
        raise ValueError("the payload is shorter than its header")
    return payload[8 : 8 + length]
