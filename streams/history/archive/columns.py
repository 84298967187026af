"""Convert payloads to columns and back: ragged tasks without padding, each tensor in its own dtype.

A payload is a safetensors body: the length of its header in 8 bytes, the header, and the contiguous bytes of the
tensors. The headers form one column and each tensor another. Joining the columns gives the same bytes again, whichever
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
    """A tensor's ``name``, its ``dtype`` as NumPy names it, and its number of dimensions (``rank``)."""

    name: str
    dtype: str
    rank: int


class TensorSlice(NamedTuple):
    """A tensor's shape and its bytes in the data of one payload: from ``first`` up to but excluding ``after``."""

    column: Column
    shape: tuple[int, ...]
    first: int
    after: int


class Ragged(NamedTuple):
    """Concatenated arrays of different lengths; array i is ``values[ends[i - 1]:ends[i]]``."""

    values: NDArray[np.generic]
    ends: NDArray[np.int64]


class Columns(NamedTuple):
    """Payloads as columns.

    Attributes:
        headers: the bytes of the headers.
        values: the concatenated values of each tensor.
        shapes: the shapes of each tensor, an array of shape (payloads, rank).
    """

    headers: Ragged
    values: dict[Column, NDArray[np.generic]]
    shapes: dict[Column, NDArray[np.int64]]


def layout(payload: bytes) -> frozenset[Column]:
    """Return the columns of a payload; all payloads of a segment have the same columns.

    Raises:
        ValueError: if the payload is not a body of contiguous tensors of known dtypes.
    """
    return frozenset(tensor_slice.column for tensor_slice in read_slices(_header(payload)))


@lru_cache(maxsize=1024)
def read_slices(header: bytes) -> tuple[TensorSlice, ...]:
    """Return the slices of the tensors that a header describes, in the order of their bytes.

    Raises:
        ValueError: as ``layout`` does.
    """
    try:
        info = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        slices = [_tensor_slice(name, value) for name, value in info.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a safetensors header: {error!r}") from error
    slices.sort(key=lambda tensor_slice: (tensor_slice.first, tensor_slice.after))
    end = 0
    for tensor_slice in slices:
        size = int(np.prod(tensor_slice.shape, dtype=np.int64)) * np.dtype(tensor_slice.column.dtype).itemsize
        if tensor_slice.first != end or tensor_slice.after != end + size:
            raise ValueError(f"the tensor {tensor_slice.column.name!r} does not directly follow the one before it")
        end = tensor_slice.after
    return tuple(slices)


def _tensor_slice(name: str, info: dict[str, object]) -> TensorSlice:
    shape, offsets = info["shape"], info["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"wrong entry of the tensor {name!r}")
    column = Column(name, _DTYPES[str(info["dtype"])], len(shape))
    return TensorSlice(column, tuple(shape), *offsets)


def split_columns(payloads: Sequence[bytes]) -> Columns:
    """Convert payloads of one layout to columns.

    Raises:
        ValueError: if a payload is not a body of tensors, or has another layout than the first.
    """
    headers = [_header(payload) for payload in payloads]
    columns = sorted(layout(payloads[0]))
    values: dict[Column, list[NDArray[np.generic]]] = {column: [] for column in columns}
    shapes: dict[Column, list[tuple[int, ...]]] = {column: [] for column in columns}
    for payload, header in zip(payloads, headers, strict=True):
        slices = read_slices(header)
        begin = 8 + len(header)
        if len(payload) != begin + (slices[-1].after if slices else 0) or {p.column for p in slices} != set(columns):
            raise ValueError("payloads of different layouts cannot share a segment")
        for tensor_slice in slices:
            count = (tensor_slice.after - tensor_slice.first) // np.dtype(tensor_slice.column.dtype).itemsize
            values[tensor_slice.column].append(
                np.frombuffer(payload, tensor_slice.column.dtype, count, begin + tensor_slice.first)
            )
            shapes[tensor_slice.column].append(tensor_slice.shape)
    return Columns(
        make_ragged(headers),
        {column: np.concatenate(parts) for column, parts in values.items()},
        {column: np.array(parts, np.int64).reshape(len(payloads), column.rank) for column, parts in shapes.items()},
    )


def join_columns(header: bytes, parts: dict[Column, NDArray[np.generic]]) -> bytes:
    """Return the payload with this header and these tensor values."""
    slices = read_slices(header)
    return b"".join(
        [len(header).to_bytes(8, "little"), header, *(parts[tensor_slice.column].tobytes() for tensor_slice in slices)]
    )


def read_spans(values: Any, spans: NDArray[np.int64], max_gap: int) -> list[NDArray[np.generic]]:
    """Return ``values[first:after]`` for each span.

    Spans that are less than ``max_gap`` apart are read together, because a read is expensive and a value is cheap.

    Args:
        values: a one-dimensional array, such as a Zarr array.
        spans: pairs (first, after), ascending, of shape (n, 2).
        max_gap: a number of values.
    """
    found: list[NDArray[np.generic]] = []
    cuts = np.flatnonzero(spans[1:, 0] - spans[:-1, 1] >= max_gap) + 1
    for span_run in np.split(spans, cuts):
        begin = int(span_run[0, 0])
        read = np.asarray(values[begin : int(span_run[-1, 1])])
        found += [read[first - begin : after - begin] for first, after in span_run.tolist()]
    return found


def make_ragged(texts: Sequence[bytes]) -> Ragged:
    """Concatenate byte strings."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return Ragged(np.frombuffer(b"".join(texts), np.uint8), ends)


def _header(payload: bytes) -> bytes:
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > len(payload) - 8:
        raise ValueError("the payload is shorter than its header")
    return payload[8 : 8 + length]
