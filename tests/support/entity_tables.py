"""One table of rows of entities in every format that a source of rows reads, and what a history must hold of it."""

import csv
import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from streams.formats import wire
from streams.history.history import History
from streams.segmenting.by_entity import EntitySource, write_saved
from streams.sources import rows, sql
from streams.spec import Limits, TaskSpec
from streams.tables.declared_columns import DeclaredColumn
from streams.types import Arrival

FORMATS = ("csv", "jsonl", "parquet", "sql")
SPEC = TaskSpec(x_shape=(7,), y="real", y_shape=(1,))
NAMES = ("id", "store", "price", "colour", "day", "sold")
COLUMNS = {
    "price": DeclaredColumn("number", missing="indicator"),
    "colour": DeclaredColumn("category", size=2),
    "day": DeclaredColumn("date", parts=("weekday",)),
}
OPTIONS: dict[str, Any] = {
    "x": ("price", "colour", "day"),
    "y": ("sold",),
    "group_by": "store",
    "time": "day",
    "window": "3d",
    "max_rows": 4,
    "support": "own past",
    "past_rows": 5,
    "columns": COLUMNS,
}


def make_table(first: int, last: int) -> list[tuple[Any, ...]]:
    """Return the rows ``first`` .. ``last`` - 1: missing prices, new colours, and a store without a name in a few.

    After every eleven rows, days pass, so that the next row closes the tasks of several stores.
    """
    table = []
    for n in range(first, last):
        draw = random.Random(n)
        price = None if draw.random() < 0.2 else draw.randint(100, 300) / 100
        store = "" if n % 13 == 12 else f"Café {draw.randrange(3)}"
        day = (datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=3 * n, days=9 * (n // 11))).isoformat()
        table.append((n + 1, store, price, draw.choice(["red", "blue", "green"]), day, draw.randrange(50)))
    return table


def path_of(folder: Path, format: str) -> Path:
    """Return the path of the file, or of the database."""
    return folder / f"table.{'sqlite' if format == 'sql' else format}"


def append_rows(folder: Path, format: str, first: int, last: int) -> None:
    """Write the rows ``first`` .. ``last`` - 1 after those that are there. A Parquet file is written as a whole."""
    path, table = path_of(folder, format), make_table(first, last)
    if format == "csv":
        with path.open("a", newline="") as file:
            csv.writer(file).writerows([NAMES, *table] if first == 0 else table)
    elif format == "jsonl":
        with path.open("a") as file:
            file.writelines(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in table)
    elif format == "parquet":
        assert first == 0, "a Parquet file does not grow"
        records = [dict(zip(NAMES, row, strict=True)) for row in table]
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=16)
    else:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(f"CREATE TABLE IF NOT EXISTS sales ({', '.join(NAMES)})")
            connection.executemany("INSERT INTO sales VALUES (?, ?, ?, ?, ?, ?)", table)
        connection.close()


def make_source(folder: Path, format: str, grows: bool = False) -> EntitySource:
    """Return the source of the table; it saves its state in ``folder`` / "sources" once ``save_in`` was called."""
    path, poll = path_of(folder, format), {"grows": grows, "poll_seconds": 0.001}
    if format == "sql":
        address, query = f"sqlite:///{path}", f"SELECT {', '.join(NAMES)} FROM sales"
        own = sql.Settings(url=address, query=query, cursor="id", batch=9, **poll, **OPTIONS)
        source = sql.create_source(own, SPEC, "stores", 0)
    else:
        source = rows.create_source(rows.Settings(path=str(path), **poll, **OPTIONS), SPEC, "stores", 0)
    assert isinstance(source, EntitySource)
    return source


def read_tasks(source: EntitySource, after: str | None = None) -> Iterator[Arrival]:
    """Yield what a source yields until nothing comes."""
    for arrival in source.read(after):
        if arrival is None:
            return
        yield arrival


def payload_of(arrival: Arrival) -> bytes:
    """Return the task of an arrival as the history holds it."""
    return wire.encode(wire.decode(arrival.body, SPEC, Limits()))


def describe_groups(source: EntitySource) -> bytes:
    """Return the open tasks, the pasts and the statistics of the schema, as bytes."""
    return write_saved(source.groups, {}, 0, ())


def expect(folder: Path, format: str) -> tuple[list[tuple[str, str, str | None]], bytes]:
    """Return (id, digest of the payload, position) of each task of a run that nothing stops, and its groups."""
    source = make_source(folder, format)
    tasks = [one for one in read_tasks(source) if one.rejection is None]
    return [(one.id, hashlib.sha256(payload_of(one)).hexdigest(), one.cursor) for one in tasks], describe_groups(source)


def list_kept(history: History) -> Sequence[tuple[str, str, str | None]]:
    """Return (id, digest of the payload, position) of each round of a history."""
    entries = [history.entry(at) for at in range(len(history))]
    payloads = [hashlib.sha256(history.payload(at)).hexdigest() for at in range(len(history))]
    return [(one.id, digest, one.cursor) for one, digest in zip(entries, payloads, strict=True)]
