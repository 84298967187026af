"""Read rows of a CSV, JSON lines, Parquet or Arrow file and cut them into tasks by count, key or detected changes.

A file of lines may grow, but rows may only be appended. The position is the end of the last task's last row, and a
task's id contains the position of its first row, so that a restart cuts the same tasks under the same ids. A change
detector restarts after each task and therefore finds the same changes again; a cut by the run's leader keeps the tasks
that were committed. The query set of a task is held out of its rows.
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

_SINGLE_ROW = (
    "a task ends where the column {key!r} changes. If the rows of a key do not lie next to each other, read them with "
    'kind = "rows" and group_by = "{key}"'
)


@dataclass(frozen=True)
class Settings(CutOptions):
    """Options of ``[[source]] kind = "samples"``; exactly one of ``count``, ``key`` and ``change`` must be set.

    A task that ends at a key is also cut at ``most`` rows, and at 64 MiB of lines.

    Attributes:
        path: the file; its suffix determines the format: .csv, .jsonl, .parquet, .arrow or .feather.
        x: the columns of a sample, in order, or one column of (nested) lists.
        y: the column of the label, or the columns of the target.
        key: the column whose change of value ends a task.
        grows: whether lines may still be appended. If not, the rows after the last key or change form a task.
        poll_seconds: how often a file that grows is checked for new lines.
    """

    path: str
    x: Annotated[tuple[str, ...], MinLen(1)]
    y: Annotated[tuple[str, ...], MinLen(1)]
    key: str | None = None
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        """Raise ``ValueError`` unless exactly one way to cut is set."""
        if [self.count, self.key, self.change].count(None) != 2:
            raise ValueError("set one of count (rows per task), key (the column whose change ends a task) and change")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | NeedsLeader | None:
    """Return the stream of the file's tasks; raise ``ValueError`` for an unknown change, likelihood or option."""
    also = () if settings.key is None else (settings.key,)
    columns = list(dict.fromkeys([*settings.x, *settings.y, *also]))
    path, grows = Path(settings.path), settings.grows
    encode = partial(encode_row, x=settings.x, y=settings.y, spec=spec)
    keep_rest = settings.count is None

    def read(cut: Cut) -> RowSource:
        rows = partial(read_rows, path, columns=columns, grows=grows)
        found = RowSource(rows, encode, cut, keep_rest, settings.poll_seconds, name)
        return found if settings.key is None else found._replace(single_row=_SINGLE_ROW.format(key=settings.key))

    if settings.key is not None:
        return read(cut_by_key(settings.key, settings.most))
    return create_cut_source(settings, encode, spec, read)
