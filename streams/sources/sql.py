"""Read rows of a database by a query with a cursor column, and group those of each entity by a key.

The cursor column is a whole number, 1 or more, that no two rows share and that is larger in later rows, such as the
number that the database gives to each new row. Rows are read in its order, so a row that is committed after one with a
larger number was read is left out. If transactions can overtake each other, let the query leave out the newest rows,
for example those of the last minute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen

from streams.brokers.login import read_secret, refuse_secrets, translate_import_errors
from streams.formats.rows import Row
from streams.segmenting.by_entity import EntitySource
from streams.segmenting.grouping import GroupOptions
from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True, kw_only=True)
class Settings(GroupOptions):
    """Options of ``[[source]] kind = "sql"``.

    Attributes:
        url: the database, as SQLAlchemy names it: "postgresql+psycopg://user@host/database", "mysql+pymysql://...",
            "sqlite:///file.db". It may contain a user but no password.
        query: a SELECT with the columns that are named here; it may join and filter, and needs no ORDER BY.
        cursor: the column with a whole number that grows from row to row.
        password_file: a file with the password.
        batch: the largest number of rows per request.
        grows: whether there may be more rows later. If not, each open task with enough rows is closed at the end.
        poll_seconds: how often new rows are looked for.
    """

    url: Annotated[str, MinLen(1)]
    query: Annotated[str, MinLen(1)]
    cursor: Annotated[str, MinLen(1)]
    password_file: str | None = None
    batch: Annotated[int, Ge(1)] = 1_000
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 5.0


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the tasks of the query's rows.

    Raises:
        ImportError: if SQLAlchemy or the driver of the database is not installed.
        ValueError: if ``url`` is invalid or contains a password, or the columns do not fit the run's tasks.
        OSError: if ``password_file`` cannot be read.
    """
    refuse_secrets("url", settings.url, 'write postgresql+psycopg://user@host/name and password_file = "..."')
    with translate_import_errors("sql"):
        import sqlalchemy
    try:
        address = sqlalchemy.engine.make_url(settings.url)
        if settings.password_file is not None:
            address = address.set(password=read_secret(settings.password_file))
        with translate_import_errors("sql"):
            engine = sqlalchemy.create_engine(address, pool_pre_ping=True)
    except sqlalchemy.exc.ArgumentError as error:
        raise ValueError(f"url = {settings.url!r} is no address of a database: {error}") from error
    rows = partial(read_query_rows, engine, settings, settings.list_columns())
    return EntitySource(rows, settings, settings.make_schema(spec), settings.grows, settings.poll_seconds, name)


def read_query_rows(engine: Any, settings: Settings, columns: Sequence[str], after: int) -> Iterator[Row | None]:
    """Yield the rows of the query whose cursor is larger than ``after``, and None while there is no further row.

    Raises:
        ValueError: if a cursor is no whole number of 1 or more, or two rows have the same.
        ConnectionError: if the database does not answer the query; the message is that of the database.
    """
    import sqlalchemy

    names = list(dict.fromkeys([settings.cursor, *columns]))
    inner = sqlalchemy.text(settings.query.strip().rstrip(";")).columns(*map(sqlalchemy.column, names))
    table = inner.subquery("source_rows")
    cursor = table.c[settings.cursor]
    wanted = sqlalchemy.select(*(table.c[name] for name in names)).order_by(cursor).limit(settings.batch)
    try:
        while True:
            try:
                with engine.connect() as connection:
                    found = connection.execute(wanted if after == 0 else wanted.where(cursor > after)).all()
            except sqlalchemy.exc.DBAPIError as error:
                raise ConnectionError(f"the database does not answer the query: {str(error.orig).strip()}") from error
            for values in found:
                at = _read_cursor(settings.cursor, values[0], after)
                yield Row(at - 1, at, dict(zip(names, values, strict=True)), b"")
                after = at
            if len(found) < settings.batch:
                if not settings.grows:
                    return
                yield None
    finally:
        engine.dispose()


def _read_cursor(name: str, value: Any, after: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the cursor {name!r} has the value {value!r}; it must be a whole number of 1 or more")
    if value == after:
        raise ValueError(f"the cursor {name!r} has the value {value} in two rows; it must be unique")
    return value
