"""Read rows of a file from any position: CSV or JSON lines, which may grow, or a Parquet or Arrow table."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors.numpy import save

from streams.formats.numbers import MISSING, read_number
from streams.formats.safetensors_header import Array
from streams.formats.text import encode_texts
from streams.spec import TaskSpec, is_dynamic, join_name
from streams.types import Rejected

LINE_BYTES = 1024 * 1024
"""The longest line that is read; a longer one is truncated to this length and marked as faulty."""


TABLES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc"}


LINES = (".csv", ".jsonl")


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        begin: the position of its first byte in a file of lines; its number, from 0, in a table.
        end: the position after the row, in the same unit as ``begin``.
        values: its values by column; None if the row cannot be parsed.
        raw: its bytes, empty for a row of a table.
        fault: why ``values`` is None, otherwise empty.
    """

    begin: int
    end: int
    values: dict[str, Any] | None
    raw: bytes
    fault: str = ""


def row_bytes(row: Row) -> bytes:
    """Return the bytes of a row as read; if it has none, as in a table, return its values as a JSON line."""
    if row.raw:
        return row.raw
    values = {"fault": row.fault} if row.values is None else row.values
    return json.dumps(values, default=_to_json).encode() + b"\n"


def _to_json(value: Any) -> Any:
    """Convert an array, a date or another value of a table to a value that JSON can hold."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_rows(path: Path, after: int, columns: Sequence[str], grows: bool) -> Iterator[Row | None]:
    """Yield the rows of a file after a position.

    If the file may grow, the iterator never ends and yields None while there is no further row.

    Args:
        path: ends with .csv (its first line names the columns), .jsonl, .parquet, .arrow or .feather.
        after: the ``end`` of the last row that was read, 0 to read from the start.
        columns: the columns to read.
        grows: whether lines may still be appended; a line is then read once its newline is there. Tables never grow.

    Raises:
        ValueError: if the file lacks a column, is shorter than ``after`` or has an unknown suffix.
        OSError: if the file cannot be read.
        ImportError: if the file is a table and pyarrow is not installed.
    """
    if path.suffix in TABLES:
        return _read_table(path, after, columns)
    if path.suffix in LINES:
        return _read_lines(path, after, columns, grows)
    raise ValueError(f"{path} ends with {path.suffix!r}; rows are read from {', '.join((*LINES, *TABLES))}")


def _read_lines(path: Path, after: int, columns: Sequence[str], grows: bool) -> Iterator[Row | None]:
    with path.open("rb") as file:
        names: list[str] | None = None
        while path.suffix == ".csv" and names is None:
            names = _read_header(path, file, columns, grows)
            if names is None:
                yield None
        header = file.tell()
        begin = max(after, header)
        while True:
            size = file.seek(0, 2)
            if size < begin:
                raise ValueError(
                    f"{path} has {size} bytes, fewer than the {begin} already read: rows may only be appended"
                )
            if size > begin > header and not _ends_line(file, begin):
                raise ValueError(
                    f"{path} has no line end before byte {begin}, where reading continues: was it replaced?"
                )
            file.seek(begin)
            while (line := _read_line(file, grows)) is not None:
                end = file.tell()
                yield _parse(begin, end, line, names, columns)
                begin = end
            if not grows:
                return
            yield None


def parse_rows(path: PurePath, data: bytes, columns: Sequence[str], optional: str) -> list[Row]:
    """Return the rows of a whole file of lines; blank lines are left out.

    Args:
        path: the path of the file, for messages; its suffix is .csv or .jsonl.
        data: the content of the file.
        columns: the columns to read.
        optional: a column that is read if the first line has it; otherwise, no row has it.

    Raises:
        ValueError: if a CSV file lacks a column.
    """
    file, names = BytesIO(data), None
    if path.suffix == ".csv":
        names = _read_header(path, file, columns, grows=False)
    wanted = [*columns, optional] if optional in (names or _names_of_json(data.split(b"\n", 1)[0])) else columns
    rows, begin = [], file.tell()
    while (line := _read_line(file, grows=False)) is not None:
        end = file.tell()
        if line.strip():
            rows.append(_parse(begin, end, line, names, wanted))
        begin = end
    return rows


def _ends_line(file: BinaryIO, position: int) -> bool:
    """Return whether the byte before a position is a newline."""
    file.seek(position - 1)
    return file.read(1) == b"\n"


def _read_header(path: PurePath, file: BinaryIO, columns: Sequence[str], grows: bool) -> list[str] | None:
    file.seek(0)
    line = _read_line(file, grows)
    if line is None and not grows:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    if line is None:
        return None
    names = _read_names(path, line)
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(f"{path} has {names.count(name) or 'no'} columns {name!r}; it has {', '.join(names)}")
    return names


def _read_names(path: PurePath, line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    except (ValueError, csv.Error) as error:
        ends = ": lines must end with \\n or \\r\\n, not with \\r alone" if b"\r" in line.rstrip(b"\r\n") else ""
        raise ValueError(
            f"{path}: its first line, which must name the columns, cannot be read ({error}){ends}"
        ) from error


def _read_line(file: BinaryIO, grows: bool) -> bytes | None:
    """Return the next line, cut at ``LINE_BYTES`` + 1; return None and consume nothing if the line is incomplete."""
    begin = file.tell()
    line = chunk = file.readline(LINE_BYTES + 1)
    while chunk and not chunk.endswith(b"\n"):
        chunk = file.readline(LINE_BYTES + 1)
    if chunk or (line and not grows):
        return line
    file.seek(begin)
    return None


def _parse(begin: int, end: int, line: bytes, names: list[str] | None, columns: Sequence[str]) -> Row:
    try:
        if end - begin > LINE_BYTES:
            raise ValueError(f"it has {end - begin} bytes; at most {LINE_BYTES} are read")
        text = line.decode("utf-8-sig" if begin == 0 else "utf-8").rstrip("\r\n")
        values = json.loads(text) if names is None else _parse_csv(text, names)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return Row(begin, end, {name: values[name] for name in columns}, line)
    except KeyError as error:
        return Row(begin, end, None, line, f"it has no {error.args[0]!r}")
    except (ValueError, RecursionError, csv.Error) as error:
        return Row(begin, end, None, line, str(error)[:200])


def _names_of_json(line: bytes) -> list[str]:
    """Return the names in a JSON object; none if the line is no object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return list(found) if isinstance(found, dict) else []


def _parse_csv(text: str, names: list[str]) -> dict[str, str]:
    cells = next(csv.reader([text], strict=True), [])
    if len(cells) != len(names):
        raise ValueError(f"it has {len(cells)} cells; the header has {len(names)}")
    return dict(zip(names, cells, strict=True))


def _read_table(path: Path, after: int, columns: Sequence[str]) -> Iterator[Row | None]:
    try:
        from pyarrow import dataset
    except ImportError as error:
        raise ImportError("tables need pyarrow: pip install 'online-meta[arrow]'") from error
    table = dataset.dataset(path, format=TABLES[path.suffix])
    for name in columns:
        if name not in table.schema.names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(table.schema.names)}")
    at = 0
    for batch in table.scanner(columns=list(columns), use_threads=False).to_batches():
        if at + len(batch) > after:
            for position, values in enumerate(_read_batch(batch.slice(max(after - at, 0))), max(after, at)):
                fault = values if isinstance(values, str) else ""
                yield Row(position, position + 1, None if isinstance(values, str) else values, b"", fault)
        at += len(batch)
    if at < after:
        raise ValueError(f"{path} has {at} rows, fewer than the {after} already read: rows may only be appended")


def _read_batch(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the values of each row, or why they cannot be read, for example a date that Python cannot hold."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, ArithmeticError):
        pass  # raised before the first row
    for at in range(len(batch)):
        try:
            yield batch.slice(at, 1).to_pylist()[0]
        except (ValueError, OverflowError, ArithmeticError) as error:
            yield str(error)[:200]


_MAX_DEPTH = 16


EncodeRow = Callable[[Row], tuple[Array, Array]]
"""Returns the sample of a row and its label or target, or raises ``Rejected``; for example a partial ``encode_row``."""


def encode_rows(rows: Sequence[Row], encode: EncodeRow) -> bytes:
    """Encode the rows of one task as a safetensors body with support_x and support_y, one sample per row, in order.

    Args:
        rows: the rows of the task, one or more.
        encode: returns the sample and the label or target of a row.

    Returns:
        A body without a query set; ``wire.decode`` holds part of the support out as the query.

    Raises:
        Rejected: whatever ``encode`` raises, or "wrong_shape" if the samples differ in shape.
    """
    pairs = [encode(row) for row in rows]
    samples, targets = [sample for sample, _ in pairs], [target for _, target in pairs]
    if len({sample.shape for sample in samples}) > 1:
        raise Rejected("wrong_shape", "the samples in the rows of a task differ in shape")
    return save({"support_x": np.stack(samples), "support_y": np.stack(targets)})


def encode_row(row: Row, x: Sequence[str], y: Sequence[str], spec: TaskSpec) -> tuple[Array, Array]:
    """Return the sample of a row and its label or target.

    Args:
        row: the row to read.
        x: the columns of the sample. Their numbers, in order, fill its shape; nested lists are flattened. Of a run
            whose samples are texts, these are joined by line ends and tokenized.
        y: the columns of the label or target, read in the same way.
        spec: the shape and dtypes of the run's tasks. If x has a dynamic dimension, ``x`` must be one column of nested
            lists of the sample's shape.

    Returns:
        The sample, of shape ``spec.x_shape`` and dtype ``spec.x_dtype``, and the label (int64) or target (float32) of
        shape ``spec.y_shape``.

    Raises:
        Rejected: with the reason "unreadable", "wrong_dtype" or "wrong_shape"; the detail names the row's position.
    """
    spec.require_single_input("a source of rows")
    target = encode_target_of(row, y, spec)
    return encode_input(row, x, spec)[""], target


def encode_target_of(row: Row, y: Sequence[str], spec: TaskSpec) -> Array:
    """Return the label or target of a row alone, as ``encode_row`` does."""
    return encode_sample(row, "y", y, spec.y_shape, "int64" if spec.y == "class" else "float32")


def encode_input(row: Row, columns: Sequence[str], spec: TaskSpec, name: str = "") -> dict[str, Array]:
    """Return the input ``name`` of a row by its name: the numbers of some columns, or the token ids of their texts.

    Texts of a run with ``[task.text]`` have the name "", and may become several inputs. Raises as ``encode_row`` does.
    """
    place = join_name("x", name)
    if spec.text_of(name) is not None and row.values is not None and isinstance(row.values[columns[0]], str):
        texts = [row.values[column] for column in columns]
        joined = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
        found = encode_texts([joined], spec, f"the row at {row.begin} in {place}", name)
        return {one: ids[0] for one, ids in found.items()}
    given = spec.inputs()[name]
    return {name: encode_sample(row, place, columns, given.shape, given.dtype)}


def encode_sample(row: Row, what: str, columns: Sequence[str], shape: tuple[int, ...], dtype: str) -> Array:
    """Return the numbers of some columns of a row as an array.

    Args:
        row: the row to read.
        what: "x", "x.NAME" or "y", for the message of an error.
        columns: the columns, in order.
        shape: the shape to fill; with a dynamic dimension, the shape of the one column.
        dtype: the dtype of the array.

    Raises:
        Rejected: as ``encode_row`` does.
    """
    if row.values is None:
        raise Rejected("unreadable", f"the row at {row.begin} cannot be read: {row.fault}")
    try:
        if is_dynamic(shape):
            shape = np.shape(row.values[columns[0]])
        whole = np.dtype(dtype).kind in "iu"
        numbers = [number for name in columns for number in _read_numbers(name, row.values[name], whole=whole)]
        if whole and numbers and not np.iinfo(dtype).min <= min(numbers) <= max(numbers) <= np.iinfo(dtype).max:
            raise ValueError(f"it lies outside {np.iinfo(dtype).min} .. {np.iinfo(dtype).max}")
        with np.errstate(over="ignore"):  # infinite values are rejected later
            values = np.array(numbers, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise Rejected(
            "wrong_dtype", f"the row at {row.begin} has no valid {dtype} for {what}: {str(error)[:400]}"
        ) from error
    if len(values) != math.prod(shape):
        found = f"the row at {row.begin} has {len(values)} numbers for {what}"
        raise Rejected("wrong_shape", f"{found}; its shape {shape} takes {math.prod(shape)}")
    return values.reshape(shape)


def _read_numbers(name: str, value: Any, *, whole: bool) -> list[int | float]:
    """Return the numbers of a column; what is none is an error that says what to declare for a text."""
    try:
        return [read_number(number, whole=whole) for number in _flatten(value)]
    except ValueError as error:
        if not isinstance(value, str):
            raise
        absent = value.strip() in MISSING
        what, kind = ("missing values", '"number"') if absent else ("texts and dates", '"category" or "date"')
        advice = f'[[source]] kind = "rows" takes {what}, too: write [source.columns.{name[:80]}] kind = {kind}'
        raise ValueError(f"column {name[:80]!r}: {error}. {advice}") from error


def _flatten(value: Any, depth: int = 0) -> Iterator[Any]:
    if not isinstance(value, list | tuple):
        yield value
    elif depth < _MAX_DEPTH:
        for item in value:
            yield from _flatten(item, depth + 1)
    else:
        raise ValueError(f"lists are nested more than {_MAX_DEPTH} deep")
