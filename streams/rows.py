"""Rows of a file, from any position: lines of CSV or JSON that may grow in number, or a Parquet or Arrow table."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

LINE_BYTES = 1024 * 1024
"""The longest line that is read; of a longer one this much is kept."""

TABLES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc"}
LINES = (".csv", ".jsonl")


class Row(NamedTuple):
    """One row: where it begins and ends, its values by column (None: it has none, ``fault`` says why), its bytes.

    Positions are bytes of the file for lines, and rows for tables.
    """

    begin: int
    end: int
    values: dict[str, Any] | None
    raw: bytes
    fault: str = ""


def row_bytes(row: Row) -> bytes:
    """Return the bytes of a row as it was read; of one that had none, such as a table's, its values as a JSON line."""
    if row.raw:
        return row.raw
    values = {"fault": row.fault} if row.values is None else row.values
    return json.dumps(values, default=_to_json).encode() + b"\n"


def _to_json(value: Any) -> Any:
    """Return what JSON can hold of an array, a date or what else a table may have."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_rows(path: Path, after: int, columns: Sequence[str], grows: bool) -> Iterator[Row | None]:
    """Yield the rows from a position, to the file's end or, where it grows, for ever: None while there are no more.

    Args:
        path: ends with .csv (its first line names the columns), .jsonl, .parquet, .arrow or .feather.
        after: the ``end`` of the last row that was taken, 0 for none.
        columns: which are needed.
        grows: whether lines may still be appended; a line then counts once its newline is there. Tables never grow.

    Raises:
        ValueError: if the file lacks a column, is shorter than ``after`` or has another ending.
        OSError: if it cannot be read.
        ImportError: if pyarrow, which reads tables, is not installed.
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
        begin = max(after, file.tell())
        while True:
            size = file.seek(0, 2)
            if size < begin:
                raise ValueError(
                    f"{path} has {size} bytes, fewer than the {begin} that were read: rows are only appended"
                )
            file.seek(begin)
            while (line := _read_line(file, grows)) is not None:
                end = file.tell()
                yield _parse(begin, end, line, names, columns)
                begin = end
            if not grows:
                return
            yield None


def _read_header(path: Path, file: BinaryIO, columns: Sequence[str], grows: bool) -> list[str] | None:
    file.seek(0)
    line = _read_line(file, grows)
    if line is None and not grows:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    if line is None:
        return None
    names = next(csv.reader([line.decode("utf-8-sig")]), [])
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(f"{path} has {names.count(name) or 'no'} columns {name!r}; it has {', '.join(names)}")
    return names


def _read_line(file: BinaryIO, grows: bool) -> bytes | None:
    """Return the next line, cut at ``LINE_BYTES`` + 1; None, and nothing is taken, where its end is not there yet."""
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
        text = line.decode("utf-8").rstrip("\r\n")
        values = json.loads(text) if names is None else _parse_csv(text, names)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return Row(begin, end, {name: values[name] for name in columns}, line)
    except KeyError as error:
        return Row(begin, end, None, line, f"it has no {error.args[0]!r}")
    except (ValueError, RecursionError, csv.Error) as error:
        return Row(begin, end, None, line, str(error)[:200])


def _parse_csv(text: str, names: list[str]) -> dict[str, str]:
    cells = next(csv.reader([text], strict=True), [])
    if len(cells) != len(names):
        raise ValueError(f"it has {len(cells)} cells; the header has {len(names)}")
    return dict(zip(names, cells, strict=True))


def _read_table(path: Path, after: int, columns: Sequence[str]) -> Iterator[Row | None]:
    try:
        from pyarrow import dataset
    except ImportError as error:
        raise ImportError("tables need a package that is missing: pip install 'online-meta[arrow]'") from error
    table = dataset.dataset(path, format=TABLES[path.suffix])
    for name in columns:
        if name not in table.schema.names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(table.schema.names)}")
    at = 0
    for batch in table.scanner(columns=list(columns), use_threads=False).to_batches():
        if at + len(batch) > after:
            for values in batch.slice(max(after - at, 0)).to_pylist():
                position = max(after, at)
                after = position + 1
                yield Row(position, position + 1, values, b"")
        at += len(batch)
