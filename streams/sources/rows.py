"""Read rows of a CSV, JSON lines, Parquet or Arrow file whose entities are interleaved, and group them by a key.

A file of lines may grow, but rows may only be appended. Categories, dates and missing values are declared in
``[source.columns.NAME]``; a column that is not declared has numbers.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from streams.formats.rows import read_rows
from streams.segmenting.by_entity import EntitySource
from streams.segmenting.grouping import GroupOptions
from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True, kw_only=True)
class Settings(GroupOptions):
    """Options of ``[[source]] kind = "rows"``.

    Attributes:
        path: the file; its suffix determines the format: .csv, .jsonl, .parquet, .arrow or .feather.
        grows: whether lines may still be appended. If not, each open task with enough rows is closed at the end.
        poll_seconds: how often a file that grows is checked for new lines.
    """

    path: str
    grows: bool = False
    poll_seconds: Annotated[float, Gt(0)] = 0.5


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the file's tasks; raise ``ValueError`` if the columns do not fit the run's tasks."""
    rows = partial(read_rows, Path(settings.path), columns=settings.list_columns(), grows=settings.grows)
    return EntitySource(rows, settings, settings.make_schema(spec), settings.grows, settings.poll_seconds, name)
