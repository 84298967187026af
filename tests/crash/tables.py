"""Rows of entities in each format, read into a history, with the state that is saved next to it."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

from streams.formats import wire
from streams.history.history import History
from streams.history.verify import verify
from streams.segmenting import by_entity
from streams.segmenting.by_entity import EntitySource
from streams.types import Arrival, Conflict, Record
from tests.crash.checks import Acknowledged
from tests.crash.scenarios import Acknowledge, Play
from tests.support.entity_tables import (
    append_rows,
    describe_groups,
    expect,
    list_kept,
    make_source,
    payload_of,
    read_tasks,
)

ROWS, SAVE_ROWS = 48, 6


def write_table(format: str, folder: Path, acknowledge: Acknowledge) -> None:
    """Write the whole table."""
    folder.mkdir()
    append_rows(folder, format, 0, ROWS)


def read_table(format: str, folder: Path, acknowledge: Acknowledge) -> None:
    """Store the tasks of the table, two at a time, from where the history ends, and save the state."""
    with History.open(folder / "history", write=True) as history:
        _read(make_source(folder, format), folder, history, acknowledge)


def _read(source: EntitySource, folder: Path, history: History, acknowledge: Acknowledge) -> None:
    source.save_in(folder / "sources")
    waiting: list[Arrival] = []
    with patch.object(by_entity, "SAVE_ROWS", SAVE_ROWS):
        for arrival in read_tasks(source, history.cursor(source.name)):
            waiting.append(arrival)
            if len(waiting) == 2:
                _keep(source, history, waiting, acknowledge)
                waiting = []
        _keep(source, history, waiting, acknowledge)


def _keep(source: EntitySource, history: History, arrivals: list[Arrival], acknowledge: Acknowledge) -> None:
    tasks = [one for one in arrivals if one.rejection is None]
    records = [Record(one.id, payload_of(one), wire.digest(one.body), one.source, one.cursor, 1000.0) for one in tasks]
    for record, answer in zip(records, history.append(records), strict=True):
        assert not isinstance(answer, Conflict), f"{record.id} has another body now"
        acknowledge({"id": record.id, "round": answer.round})
    source.ack([one._replace(body=b"") for one in arrivals])


def check_table(format: str, folder: Path, acknowledged: Acknowledged) -> None:
    """Check that the next start ends with the rounds and the statistics of a run that nothing stops."""
    right, groups = expect(folder, format)
    with History.open(folder / "history", write=True) as history:
        kept = list_kept(history)
        assert kept == right[: len(kept)], "the rounds are not those of a run that nothing stops"
        for said in acknowledged:
            assert kept[said["round"]][0] == said["id"], f"{said} was acknowledged, and is lost"
        source = make_source(folder, format)
        _read(source, folder, history, lambda said: None)
        assert list_kept(history) == right
        assert describe_groups(source) == groups, "the statistics are others"
    found = verify(folder / "history")
    assert found.clean, str(found)


def make_table_life(format: str) -> tuple[Play, Play, partial[None]]:
    """Return what prepares a life that reads a table in a format, the life, and its check."""
    return partial(write_table, format), partial(read_table, format), partial(check_table, format)
