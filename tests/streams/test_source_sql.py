"""Rows of a database are read by a cursor column, from any position, as tasks of entities."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy

from streams.entities import find_entity
from streams.formats import wire
from streams.segmenting.by_entity import EntitySource
from streams.sources import sql
from streams.spec import Limits, TaskSpec
from streams.tables.declared_columns import DeclaredColumn
from streams.types import Arrival
from tests.support.servers import Postgres

SPEC = TaskSpec(x_shape=(4,), y="real", y_shape=(1,))
COLUMNS = {"price": DeclaredColumn("number", missing="indicator"), "day": DeclaredColumn("date", parts=("weekday",))}
QUERY = "SELECT s.id AS id, t.name AS store, s.price, s.day, s.sold FROM sales s JOIN stores t ON t.id = s.store;"
REST = "1 AS store, 1 AS price, 1 AS day, 1 AS sold"
SALES = sqlalchemy.Table(
    "sales",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
    sqlalchemy.Column("store", sqlalchemy.Integer),
    sqlalchemy.Column("price", sqlalchemy.Numeric(8, 2)),
    sqlalchemy.Column("day", sqlalchemy.DateTime(timezone=True)),
    sqlalchemy.Column("sold", sqlalchemy.Integer),
)
STORES = sqlalchemy.Table(
    "stores",
    SALES.metadata,
    sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
    sqlalchemy.Column("name", sqlalchemy.Text),
)


def fill(engine: sqlalchemy.Engine, first: int, last: int) -> None:
    """Write the sales ``first`` .. ``last``; some numbers are left out, as databases do after a rollback."""
    draw = random.Random(first)
    with engine.begin() as connection:
        if first == 1:
            SALES.metadata.create_all(connection)
            connection.execute(STORES.insert(), [{"id": n, "name": f"Store {n}"} for n in range(5)])
        begin = datetime(2024, 1, 1, tzinfo=UTC)
        for id in range(first, last + 1):
            if id % 7:
                price = None if draw.random() < 0.1 else draw.randint(100, 300) / 100
                sale = {"id": id, "store": draw.randrange(5), "price": price, "day": begin + timedelta(hours=id)}
                connection.execute(SALES.insert(), [{**sale, "sold": draw.randrange(50)}])


def make_source(url: str, **options: object) -> EntitySource:
    given = {"query": QUERY, "cursor": "id", "group_by": "store", "x": ("price", "day"), "y": ("sold",), **options}
    settings = sql.Settings(url=url, columns=COLUMNS, max_rows=6, batch=10, poll_seconds=0.5, **given)
    source = sql.create_source(settings, SPEC, "db", 0)
    assert isinstance(source, EntitySource)
    source.clock = iter(range(10**9)).__next__
    return source


def read_all(stream: Iterator[Arrival | None]) -> list[Arrival]:
    return list(iter(lambda: next(stream), None))


def check_reading(engine: sqlalchemy.Engine, url: str, **options: object) -> None:
    """Read a database that grows, with a restart at each position."""
    fill(engine, 1, 90)
    stream = make_source(url, support="own past", **options).read(None)
    found = read_all(stream)
    assert found
    fill(engine, 91, 200)
    found += read_all(stream)
    assert {find_entity(one.id) for one in found} == {f"Store {n}" for n in range(5)}
    assert sum(len(wire.decode(one.body, SPEC, Limits()).query.y) for one in found) > 100
    for at, arrival in enumerate(found):
        assert read_all(make_source(url, support="own past", **options).read(arrival.cursor)) == found[at + 1 :]


def test_a_database_is_read_as_it_grows_and_from_any_position(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    check_reading(sqlalchemy.create_engine(url), url)


def test_the_end_of_the_rows_closes_the_open_tasks_if_there_are_no_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    fill(sqlalchemy.create_engine(url), 1, 20)
    open_ended, ended = (read_all(make_source(url, grows=grows).read(None)) for grows in (True, False))
    assert ended[: len(open_ended)] == open_ended
    assert len(ended) >= len(open_ended) + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": f"SELECT 1 AS id, {REST} UNION ALL SELECT 1, {REST}"}, "the value 1 in two rows; it must be unique"),
        ({"query": f"SELECT 'x' AS id, {REST}"}, "'id' has the value 'x'; it must be a whole number of 1 or more"),
        ({"query": f"SELECT 0 AS id, {REST}"}, "must be a whole number of 1 or more"),
        ({"query": "SELECT id FROM sales"}, "does not answer the query: no such column: source_rows.price"),
        ({"query": "SELECT * FROM sale"}, "does not answer the query: no such table: sale"),
    ],
)
def test_a_query_that_does_not_fit_says_why(tmp_path: Path, options: dict, message: str) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    fill(sqlalchemy.create_engine(url), 1, 20)
    with pytest.raises((ValueError, ConnectionError), match=message):
        read_all(make_source(url, **options).read(None))


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("nonsense", ValueError, "url = 'nonsense' is no address of a database"),
        ("postgresql+psycopg://me:secret@host/db", ValueError, "url contains a secret"),
        ("mysql+mysqldb://me@host/db", ImportError, "No module named 'MySQLdb'"),
    ],
)
def test_an_address_that_cannot_be_used_says_why(url: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_source(url)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # below tmp_path the server's user could not reach it
    server = Postgres(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def test_a_real_postgresql_is_read_through_a_kill_of_the_server(postgres: Postgres, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text(postgres.password)
    secret.chmod(0o600)
    address = sqlalchemy.engine.make_url(postgres.url).set(password=postgres.password)
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    check_reading(engine, postgres.url, password_file=str(secret))
    source = make_source(postgres.url, password_file=str(secret))
    whole = read_all(source.read(None))
    postgres.kill()
    with pytest.raises(ConnectionError, match=r"the database does not answer the query: .*onnection"):
        read_all(source.read(whole[3].cursor))
    postgres.start()
    assert read_all(source.read(whole[3].cursor)) == whole[4:]
    secret.write_text("wrong")
    refused = make_source(postgres.url, password_file=str(secret))
    with pytest.raises(ConnectionError, match="password authentication failed"):
        read_all(refused.read(None))
