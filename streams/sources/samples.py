"""Rows without task boundaries, cut by count, by key or where they change: CSV, JSON lines, Parquet or Arrow.

A file of lines may grow; rows are only ever appended. The position is where the last task's last row ended, and a
task's id says where its first row began: after a restart, the same tasks are cut under the same ids. What looks for
changes starts anew behind each task, so that it, too, finds the same ones (by the run's leader, those that were
committed). A task's query is held out of its rows.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, MinLen

from streams.formats.rows import encode_row, read_rows
from streams.segmenting.by_leader import NeedsLeader
from streams.segmenting.cutting import Cut, RowSource, cut_by_key
from streams.segmenting.options import CutOptions, create_cut_source
from streams.spec import TaskSpec
from streams.types import TaskSource


@dataclass(frozen=True)
class Settings(CutOptions):
    """Options of ``[[source]] kind = "samples"``; one of ``count``, ``key`` and ``change`` says where a task ends.

    By key, too, a task is cut at ``most`` rows, and at 64 MiB of lines.

    Attributes:
        path: the file; its ending tells the format: .csv, .jsonl, .parquet, .arrow or .feather.
        x: the columns that make up one sample, in order; or one column of (nested) lists.
        y: the column of the label, or those of the target.
        key: a task ends where the value of this column changes.
        grows: whether lines may still be appended. If not, the rows behind the last key or change are a task.
        poll_seconds: how often a file that grows is looked at.
    """

    path: str
    x: Annotated[tuple[str, ...], MinLen(1)]
    y: Annotated[tuple[str, ...], MinLen(1)]
    key: str | None = None
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        """Refuse two ways to cut, or none."""
        if [self.count, self.key, self.change].count(None) != 2:
            raise ValueError("give one of count (rows a task), key (the column whose change ends a task) and change")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | NeedsLeader | None:
    """Return the stream of the file's tasks; raises ``ValueError`` for an unknown change, likelihood or option."""
    also = () if settings.key is None else (settings.key,)
    columns = list(dict.fromkeys([*settings.x, *settings.y, *also]))
    path, grows = Path(settings.path), settings.grows
    encode = partial(encode_row, x=settings.x, y=settings.y, spec=spec)
    keep_rest = settings.count is None

    def read(cut: Cut) -> RowSource:
        rows = partial(read_rows, path, columns=columns, grows=grows)
        return RowSource(rows, encode, cut, keep_rest, settings.poll_seconds, name)

    if settings.key is not None:
        return read(cut_by_key(settings.key, settings.most))
    return create_cut_source(settings, encode, spec, read)
