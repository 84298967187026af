"""Tasks per second from tables of rows, next to the same tasks as safetensors files."""

import csv
import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy
from pyarrow import parquet

from streams.formats.wire import canonical_bytes
from streams.sources import files, rows, sql
from streams.spec import Limits, TaskSpec
from streams.tables.declared_columns import DeclaredColumn
from streams.types import Arrival, TaskSource
from tests.benchmarks.streams.figure import Figure, make_figure

TITLE = (
    "Tables: 60 entities with 40 interleaved rows each, of a category, a date, a number and a target; reading, "
    "encoding and validation, next to the same tasks as safetensors files"
)
ENTITIES, ROWS, ROUNDS = 60, 40, 3
SPEC = TaskSpec(x_shape=(9,), y="real", y_shape=(1,))
COLUMNS = {
    "place": DeclaredColumn("category", size=3),
    "day": DeclaredColumn("date", parts=("day", "weekday")),
    "price": DeclaredColumn("number", missing="indicator"),
}
GROUPED = {"x": ("place", "day", "price"), "y": ("sold",), "group_by": "store", "columns": COLUMNS}
NAMES = ("csv", "jsonl", "parquet", "sqlite", "csv task files")


def measure(folder: Path) -> dict[str, list[float]]:
    """Return the tasks per second of each path in each round."""
    makers = _write(folder)
    samples: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            began, found = time.perf_counter(), 0
            for arrival in _read(make()):
                assert arrival.rejection is None, arrival.rejection
                canonical_bytes(arrival.body, SPEC, Limits())
                found += 1
            assert found == ENTITIES, (name, found)
            samples[name].append(found / (time.perf_counter() - began))
    return samples


def make_figures(samples: dict[str, list[float]]) -> list[Figure]:
    """Return the figures."""
    plain = samples["safetensors"]
    ratios = [
        make_figure(f"tasks per second from {name} / from safetensors files", list(map(_divide, samples[name], plain)))
        for name in NAMES
    ]
    return [make_figure("tasks per second from safetensors files", plain), *ratios]


def _divide(one: float, other: float) -> float:
    return one / other


def _read(source: TaskSource | None) -> Iterator[Arrival]:
    assert source is not None
    for arrival in takewhile(lambda one: one is not None, source.read(None)):
        assert arrival is not None
        yield arrival


def _write(folder: Path) -> dict[str, Callable[[], TaskSource | None]]:
    """Write the rows in each format; return what opens each of them."""
    draw = random.Random(0)
    table: list[dict[str, Any]] = [
        {
            "id": 0,
            "store": f"Store {store}",
            "place": draw.choice(["city", "mall", "village"]),
            "day": f"2024-01-{1 + draw.randrange(28):02}",
            "price": round(draw.uniform(1, 3), 2),
            "sold": draw.randrange(100),
        }
        for store in range(ENTITIES)
        for _ in range(ROWS)
    ]
    draw.shuffle(table)
    for number, row in enumerate(table, 1):
        row["id"] = number
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    parquet.write_table(pa.Table.from_pylist(table), folder / "a.parquet")
    url = f"sqlite:///{folder}/a.db"
    made = sqlalchemy.MetaData()
    columns = (sqlalchemy.Column(name, sqlalchemy.Integer if name == "id" else sqlalchemy.Text) for name in table[0])
    sales = sqlalchemy.Table("sales", made, *columns)
    engine = sqlalchemy.create_engine(url)
    made.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sales.insert(), table)
    engine.dispose()

    def open_rows(name: str) -> Callable[[], TaskSource | None]:
        settings = rows.Settings(path=str(folder / name), **GROUPED)
        return lambda: rows.create_source(settings, SPEC, "rows", 0)

    database = sql.Settings(url=url, query="SELECT * FROM sales", cursor="id", grows=False, **GROUPED)
    for arrival in _read(open_rows("a.csv")()):
        for kind in ("plain", "lines"):
            (folder / kind).mkdir(exist_ok=True)
        (folder / "plain" / f"{arrival.id}.safetensors").write_bytes(arrival.body)
    for store in range(ENTITIES):
        lines = "".join(f"{','.join(f'{draw.random():.3f}' for _ in range(10))}\n" for _ in range(ROWS))
        names = ",".join(f"c{number}" for number in range(10))
        (folder / "lines" / f"store-{store}.csv").write_text(f"{names}\n{lines}")
    numbered = tuple(f"c{number}" for number in range(10))
    lines_of = files.Settings(str(folder / "lines"), x=numbered[:9], y=numbered[9:])
    return {
        "safetensors": lambda: files.create_source(files.Settings(str(folder / "plain")), SPEC, "files", 0),
        "csv": open_rows("a.csv"),
        "jsonl": open_rows("a.jsonl"),
        "parquet": open_rows("a.parquet"),
        "sqlite": lambda: sql.create_source(database, SPEC, "sql", 0),
        "csv task files": lambda: files.create_source(lines_of, SPEC, "lines", 0),
    }
