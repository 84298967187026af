"""Rows without task boundaries, cut by count, by key or where they change: CSV, JSON lines, Parquet or Arrow.

A file of lines may grow; rows are only ever appended. The position is where the last task's last row ended, and a
task's id says where its first row began: after a restart, the same tasks are cut under the same ids. What looks for
changes starts anew behind each task, so that it, too, finds the same ones. A task's query is held out of its rows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen

from streams.arrivals import TaskSource
from streams.sources._changes import build_segmenter, by_change
from streams.sources._samples import Cut, Samples, by_count, by_key
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "samples"``; one of ``count``, ``key`` and ``change`` says where a task ends.

    Attributes:
        path: the file; its ending tells the format: .csv, .jsonl, .parquet, .arrow or .feather.
        x: the columns that make up one sample, in order; or one column of (nested) lists.
        y: the column of the label, or those of the target.
        count: a task has so many rows.
        key: a task ends where the value of this column changes.
        change: a task ends where this finds a change: a file of ``online_meta/segmentation``, with ``change_options``.
        likelihood: one of ``online_meta/likelihoods``, with ``likelihood_options``; left out: the one that fits ``y``.
        most: by key or change, a task is cut at so many rows (and at 64 MiB of lines).
        grows: whether lines may still be appended. If not, the rows behind the last key or change are a task.
        poll_seconds: how often a file that grows is looked at.
    """

    path: str
    x: Annotated[tuple[str, ...], MinLen(1)]
    y: Annotated[tuple[str, ...], MinLen(1)]
    count: Annotated[int, Ge(2)] | None = None
    key: str | None = None
    change: str | None = None
    change_options: dict[str, Any] = field(default_factory=dict)
    likelihood: str | None = None
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    most: Annotated[int, Ge(2)] = 1_000
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        """Refuse two ways to cut, or none."""
        if [self.count, self.key, self.change].count(None) != 2:
            raise ValueError("give one of count (rows a task), key (the column whose change ends a task) and change")


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the file's tasks; raises ``ValueError`` for an unknown change, likelihood or option."""
    where = (Path(settings.path), settings.x, settings.y, () if settings.key is None else (settings.key,))
    follows = (settings.count is None, _cut(settings, spec), settings.grows, settings.poll_seconds)
    return Samples(*where, *follows, spec, name)


def _cut(settings: Settings, spec: TaskSpec) -> Cut:
    if settings.change is not None:
        likelihood = (settings.likelihood, settings.likelihood_options)
        segmenter = build_segmenter(spec, settings.change, settings.change_options, *likelihood)
        return by_change(segmenter, settings.x, settings.y, spec, settings.most)
    return by_count(settings.count or 0) if settings.key is None else by_key(settings.key, settings.most)
