"""A history that one process appends to while another one maintains it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.history import ledger
from streams.history.errors import HistoryBusy, HistoryMissing
from streams.history.history import History
from streams.history.maintenance import is_due
from streams.history.retention import RetentionSettings
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.types import Record

Make = Callable[..., Record]
FIVE = SealingSettings(segment_rounds=5)


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[History]:
    monkeypatch.setattr(ledger, "EXIT_GRACE_SECONDS", 0.1)
    with History.open(tmp_path, write=True) as opened:
        yield opened


def test_maintenance_can_seal_but_not_append(writer: History, make_record: Make) -> None:
    with History.open_for_maintenance(writer.path) as maintained:
        with pytest.raises(ValueError, match="it was opened for maintenance"):
            maintained.append([make_record(0)])
        writer.append([make_record(n) for n in range(5)])
        assert seal_next(maintained, FIVE) is not None
        assert evict_payloads(maintained, 0) == 1
        writer.append([make_record(5)])
        assert [writer.payload(n) for n in range(6)] == [make_record(n).payload for n in range(6)]


def test_there_is_only_one_maintenance_process(writer: History) -> None:
    with (
        History.open_for_maintenance(writer.path),
        pytest.raises(HistoryBusy, match="already has a maintenance process"),
    ):
        History.open_for_maintenance(writer.path)
    History.open_for_maintenance(writer.path).close()


def test_the_next_writer_waits_for_the_last_writers_maintenance(writer: History) -> None:
    with History.open_for_maintenance(writer.path):
        writer.close()
        with pytest.raises(HistoryBusy, match="already has a maintenance process"):
            History.open(writer.path, write=True)
    History.open(writer.path, write=True).close()


def test_maintenance_requires_a_history(tmp_path: Path) -> None:
    with pytest.raises(HistoryMissing):
        History.open_for_maintenance(tmp_path)


def test_a_maintenance_transaction_leaves_the_writer_time(
    writer: History, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("streams.history.history.time.sleep", pauses.append)
    writer.append([make_record(n) for n in range(5)])
    assert pauses == []
    with History.open_for_maintenance(writer.path) as maintained:
        seal_next(maintained, FIVE)
    assert [pause > 0 for pause in pauses] == [True]


def test_maintenance_is_due_only_when_there_is_work(writer: History, make_record: Make) -> None:
    unlimited = RetentionSettings()
    writer.append([make_record(n) for n in range(4)])
    assert not is_due(writer, FIVE, unlimited)
    assert is_due(writer, SealingSettings(segment_bytes=len(make_record(0).payload)), unlimited)
    assert is_due(writer, FIVE, RetentionSettings(rounds=100))
    writer.append([make_record(4)])
    assert is_due(writer, FIVE, unlimited)
    seal_next(writer, FIVE)
    assert not is_due(writer, FIVE, unlimited)
    assert is_due(writer, SealingSettings(segment_rounds=5, ledger_bytes=0), unlimited)
    with writer.borrow_writer() as connection:
        connection.execute("INSERT INTO thinned VALUES (0, 5)")
    assert is_due(writer, FIVE, unlimited)
