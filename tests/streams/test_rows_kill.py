"""A process that reads rows of entities is killed at named points: afterwards, the rounds are as if it never was."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from streams.history.history import History
from streams.history.verify import verify
from streams.ingest.ingest import Ingest
from streams.segmenting import by_entity
from streams.segmenting.by_entity import EntitySource
from streams.segmenting.grouping import Groups
from streams.spec import Limits
from streams.types import Conflict, Receipt, Record
from tests.support.entity_tables import FORMATS, SPEC, append_rows, describe_groups, expect, list_kept, make_source
from tests.support.ingesting import until

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["streams.ingest.ingest", "tests.support.entity_tables", "pyarrow.dataset"])
PLACES: dict[str, tuple[Any, str]] = {
    "row": (Groups, "add"),
    "commit": (History, "append"),
    "hold": (EntitySource, "hold_state"),
    "save": (by_entity, "replace_file"),
    "acknowledge": (EntitySource, "ack"),
}
COUNTS = {"row": (1, 9), "commit": (1, 2), "hold": (1, 2), "save": (1, 2), "acknowledge": (1,)}
POINTS = [(place, after, count) for place in PLACES for count in COUNTS[place] for after in (False, True)]
ROWS_A_LIFE = 25


def pull(folder: Path, format: str, grows: bool, ended: Callable[[], bool]) -> EntitySource:
    """Read a table through a real ingest from where the history ends, until ``ended``."""
    by_entity.SAVE_ROWS = 5
    source = make_source(folder, format, grows)
    source.save_in(folder / "sources")
    with History.open(folder / "history", write=True) as history:
        limits = Limits(commit_batch=2)
        with closing(Ingest(history, SPEC, limits, lambda: len(history), lambda *_: None, lambda *_: None)) as ingest:
            ingest.pull("stores", source)
            until(ended)
    return source


def read_dying(folder: Path, format: str, place: str, after: bool, count: int) -> None:
    """Read a table, and die just before or after the ``count``-th call of a place."""
    owner, name = PLACES[place]
    real, left = getattr(owner, name), count

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **options)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)
    append = History.append

    def append_slowly(self: History, records: Sequence[Record]) -> list[Receipt | Conflict]:
        time.sleep(0.02)  # so that reading is ahead of the commits
        return append(self, records)

    History.append = append_slowly  # type: ignore[method-assign]
    pull(folder, format, format != "parquet", lambda: False)


@pytest.mark.parametrize("format", FORMATS)
def test_kills_at_named_points_change_no_round_and_no_statistics(tmp_path: Path, format: str) -> None:
    last, kept = len(POINTS) * ROWS_A_LIFE, 0
    if format == "parquet":
        append_rows(tmp_path, format, 0, last)
    # A Parquet file has all rows from the start, so that the first lives read it to the end and save that twice.
    points = [point for point in POINTS if format != "parquet" or (point[0], point[2]) != ("save", 2)]
    for life, (place, after, count) in enumerate(points):
        if format != "parquet":
            append_rows(tmp_path, format, life * ROWS_A_LIFE, (life + 1) * ROWS_A_LIFE)
        process = START.Process(target=read_dying, args=(tmp_path, format, place, after, count), daemon=True)
        process.start()
        process.join(200)
        assert process.exitcode == -signal.SIGKILL, (place, after, count)
        with History.open(tmp_path / "history", write=False) as history:
            assert len(history) >= kept
            kept = len(history)
    right, groups = expect(tmp_path, format)
    assert ".end." in str(right[-1][2]), "the last task is closed after the last row"
    assert 0 < kept < len(right) + (format == "parquet")  # it has all rows from the start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_entity, "SAVE_ROWS", 5)
        source = pull(tmp_path, format, False, lambda: _is_done(tmp_path, right))
    with History.open(tmp_path / "history", write=False) as history:
        assert list_kept(history) == right
    assert describe_groups(source) == groups
    assert verify(tmp_path / "history").clean


def _is_done(folder: Path, right: list[Any]) -> bool:
    with History.open(folder / "history", write=False) as history:
        return len(history) >= len(right)
