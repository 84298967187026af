"""Read a task from an Arrow IPC file with one row per sample.

The columns are ``x`` and ``y`` (of named inputs and targets ``x.NAME`` and ``y.NAME``) and, optionally, ``weight`` and
``query`` (boolean). ``x`` and ``y`` hold numbers, fixed-size lists of
numbers (nested, for more dimensions) or fixed-shape tensors. A flat list is reshaped to the sample shape of the run's
configuration. Rows whose ``query`` is true form the query set, all others the support set.
"""

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from streams.formats.safetensors_header import Array
from streams.spec import TaskSpec, is_dynamic, join_name
from streams.types import Rejected

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"ARROW1\x00\x00"
_OPTIONAL = ("weight", "query")


def read_arrow(data: bytes, spec: TaskSpec) -> dict[str, Array]:
    """Return the arrays support_x, support_y and so on and, if the file has a column ``query``, those of the query.

    Args:
        data: the bytes of the file. Compressed buffers are rejected, so the arrays are no larger than the file.
        spec: the shape and dtypes of the run's tasks.

    Returns:
        Arrays of shape (rows, *sample shape) by name, with the dtypes of the file; ``wire.decode`` checks them later.

    Raises:
        Rejected: with the reason "unreadable", "missing_tensor", "unknown_tensor", "wrong_dtype" or "wrong_shape".
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError("Arrow files need pyarrow: pip install 'online-meta[arrow]'") from error
    shapes = {join_name("x", name): one.shape for name, one in spec.inputs().items()}
    shapes |= {join_name("y", name): one.shape for name, one in spec.list_targets().items()}
    try:
        columns = _read_columns(data, (*shapes,))
    except (pa.ArrowException, struct.error, ValueError, TypeError, KeyError, MemoryError, OSError) as error:
        raise _unreadable(str(error)[:200]) from error
    arrays = {name: _shaped(name, columns[name], shape) for name, shape in shapes.items()}
    if "weight" in columns:
        arrays["weight"] = columns["weight"].astype(np.float32)
    if "query" not in columns:
        return {f"support_{name}": values for name, values in arrays.items()}
    query = columns["query"].astype(bool)
    parts = (("support", ~query), ("query", query))
    return {f"{part}_{name}": values[rows] for part, rows in parts for name, values in arrays.items()}


def _read_columns(data: bytes, required: tuple[str, ...]) -> dict[str, Array]:
    """Return the values of each column, of shape (rows, ...), concatenated over all record batches."""
    import pyarrow as pa

    if not data.startswith(MAGIC):
        raise _unreadable("it does not begin as an Arrow IPC file does")
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(pa.py_buffer(data)[len(MAGIC) :]))
    first = _next_message(messages)
    if first is None or first.type != "schema":
        raise _unreadable("it does not begin with a schema")
    schema = pa.ipc.read_schema(first)
    _check_names(schema.names, required)
    parts: dict[str, list[Array]] = {name: [] for name in schema.names}
    while (message := _next_message(messages)) is not None:
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise _unreadable("it holds dictionaries or compressed buffers: write plain columns, without compression")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        for name in schema.names:
            parts[name].append(_values(name, batch.column(name)))
    if not parts[required[0]]:
        raise _unreadable("it has no record batch")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _next_message(messages: "pa.ipc.MessageReader") -> "pa.ipc.Message | None":
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _check_names(names: list[str], required: tuple[str, ...]) -> None:
    for name in names:
        if name not in required + _OPTIONAL or names.count(name) > 1:
            columns = ", ".join(required + _OPTIONAL)
            detail = f"unexpected or repeated column {name[:80]!r}; the columns are {columns}, each once"
            raise Rejected("unknown_tensor", detail)
    for name in required:
        if name not in names:
            raise Rejected("missing_tensor", f"the column {name!r} is missing; {' and '.join(required)} are required")


def _is_compressed(metadata: bytes) -> bool:
    """Return whether a record batch declares compressed buffers; pyarrow trusts the sizes that such buffers claim."""
    message = struct.unpack_from("<I", metadata)[0]
    batch_at = _field(metadata, message, 2)
    batch = batch_at + struct.unpack_from("<I", metadata, batch_at)[0]
    return _field(metadata, batch, 3) != 0


def _field(flat: bytes, table: int, slot: int) -> int:
    """Return the offset of the field ``slot`` of a FlatBuffers table, 0 if the table lacks the field."""
    entries = table - int(struct.unpack_from("<i", flat, table)[0])
    if entries < 0 or 4 + 2 * slot >= struct.unpack_from("<H", flat, entries)[0]:
        return 0
    place = int(struct.unpack_from("<H", flat, entries + 4 + 2 * slot)[0])
    return table + place if place else 0


def _values(name: str, column: "pa.Array") -> Array:
    import pyarrow as pa

    if name == "query":
        if not pa.types.is_boolean(column.type) or column.null_count:
            raise Rejected("wrong_dtype", f"the column query has type {str(column.type)[:80]}; it must be boolean")
        return np.asarray(column.to_numpy(zero_copy_only=False))
    shape = [len(column)]
    if isinstance(column.type, pa.FixedShapeTensorType):
        shape += column.type.shape
        column = column.storage.flatten()
        if math.prod(shape) != len(column):
            raise _unreadable(f"the column {name} has missing values")
    while pa.types.is_fixed_size_list(column.type):
        rows, size, column = len(column), column.type.list_size, column.flatten()
        shape.append(size)
        if not size or len(column) != rows * size:
            raise _unreadable(f"the column {name} has empty lists or missing values")
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        detail = f"the column {name} has type {str(column.type)[:80]}; it must be numbers, or lists of a fixed size"
        raise Rejected("wrong_dtype", f"{detail}, without missing values")
    return np.asarray(column.to_numpy(zero_copy_only=True)).reshape(shape)


def _shaped(name: str, values: Array, shape: tuple[int, ...]) -> Array:
    """Reshape samples that arrived as flat lists to the configured sample shape."""
    if values.ndim == 2 and len(shape) != 1 and not is_dynamic(shape) and values.shape[1] == math.prod(shape):
        return values.reshape(len(values), *shape)
    if values.ndim > 16:
        raise Rejected("wrong_shape", f"the column {name} has {values.ndim} dimensions; at most 16 are accepted")
    return values


def _unreadable(what: str) -> Rejected:
    return Rejected("unreadable", f"the file cannot be read as Arrow IPC: {what}")
