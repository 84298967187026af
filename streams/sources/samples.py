"""Rows without task boundaries, cut into tasks by count or by key: a CSV, JSON-lines, Parquet or Arrow file.

A file of lines may grow; rows are only ever appended. The position is where the last task's last row ended, and a
task's id says where its first row began: after a restart, the same tasks are cut under the same ids. A task's query is
held out of its rows, as of any task that brings none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, MinLen

from streams.arrivals import TaskSource
from streams.sources._samples import Samples, by_count, by_key
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "samples"``; one of ``count`` and ``key`` says where a task ends.

    Attributes:
        path: the file; its ending tells the format: .csv, .jsonl, .parquet, .arrow or .feather.
        x: the columns that make up one sample, in order; or one column of (nested) lists.
        y: the column of the label, or those of the target.
        count: a task has so many rows.
        key: a task ends where the value of this column changes.
        most: by key, a task is cut at so many rows (and at 64 MiB of lines).
        grows: whether lines may still be appended. If not, the rows behind the last change of the key are a task.
        poll_seconds: how often a file that grows is looked at.
    """

    path: str
    x: Annotated[tuple[str, ...], MinLen(1)]
    y: Annotated[tuple[str, ...], MinLen(1)]
    count: Annotated[int, Ge(2)] | None = None
    key: str | None = None
    most: Annotated[int, Ge(2)] = 1_000
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        """Refuse two ways to cut, or none."""
        if (self.count is None) == (self.key is None):
            raise ValueError("give one of count (rows a task) and key (the column whose change ends a task)")


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the file's tasks."""
    cut = by_key(settings.key, settings.most) if settings.key is not None else by_count(settings.count or 0)
    where = (Path(settings.path), settings.x, settings.y, settings.key, cut)
    return Samples(*where, settings.grows, settings.poll_seconds, spec, name)
