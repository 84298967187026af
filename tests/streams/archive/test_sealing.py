"""Rounds move from the ledger into the archive, and readers see no difference."""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from streams.history import archive_index, ledger
from streams.history.archive_index import Location, record_location
from streams.history.errors import ArchiveMoved, ArchiveUnreachable, HistoryDamaged
from streams.history.history import History
from streams.history.maintenance import Maintenance
from streams.history.retention import RetentionSettings
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next
from streams.history.verify import verify
from streams.types import Record
from tests.support.object_store import BucketServer, free_port, running

Make = Callable[..., Record]
FIVE = SealingSettings(segment_rounds=5, ledger_bytes=0)
ROUNDS = 23
TIMEOUT_SECONDS = 200.0


@pytest.fixture
def filled(history: History, make_record: Make) -> History:
    history.append([make_record(n) for n in range(ROUNDS)])
    return history


def seal_all(history: History, settings: SealingSettings = FIVE) -> int:
    return sum(1 for _ in iter(lambda: seal_next(history, settings), None))


def in_ledger(history: History) -> list[int]:
    return [round for (round,) in history.query("SELECT round FROM payloads ORDER BY round")]


def set_archive(history: History, bucketed: BucketServer) -> None:
    with history.borrow_writer() as writer:
        record_location(writer, Location(bucketed.url, bucketed.options))


def test_full_segments_are_sealed_and_then_leave_the_ledger(filled: History) -> None:
    before = [filled.payload(round) for round in range(ROUNDS)]
    assert seal_all(filled) == 4
    assert in_ledger(filled) == list(range(ROUNDS)), "sealing evicts nothing"
    assert evict_payloads(filled, 0) == 4
    assert in_ledger(filled) == [20, 21, 22]
    assert [filled.payload(round) for round in range(ROUNDS)] == before
    with History.open(filled.path, write=False) as reader:
        assert [reader.payload(round) for round in range(ROUNDS)] == before
        assert reader[7].support.x.equal(filled[7].support.x)
        assert reader.entry(7) == filled.entry(7)
    assert verify(filled.path).clean


def test_the_bytes_of_a_segment_are_bounded(filled: History) -> None:
    size = len(filled.payload(0))
    assert seal_all(filled, SealingSettings(segment_bytes=3 * size)) == 7
    assert [last - first for first, last in filled.query("SELECT first, last FROM segments")] == [2] * 7


def test_a_segment_ends_where_the_layout_of_tasks_changes(filled: History, make_record: Make) -> None:
    other = make_record(0).payload.replace(b'"support_x":{"dtype":"F32"', b'"support_x":{"dtype":"I32"')
    assert other != make_record(0).payload
    filled.append([make_record(100 + n)._replace(payload=other) for n in range(6)])
    assert seal_all(filled) == 6
    bounds = filled.query("SELECT first, last FROM segments ORDER BY first")
    assert bounds == [(0, 4), (5, 9), (10, 14), (15, 19), (20, 22), (23, 27)]
    assert verify(filled.path).clean


def test_the_ledger_evicts_only_what_it_must_and_its_file_shrinks(history: History, make_record: Make) -> None:
    for first in range(0, 200, 20):
        history.append([padded(make_record(n), n) for n in range(first, first + 20)])
    seal_all(history)
    full = archive_index.ledger_bytes(history.query)
    assert full > 10_000_000
    evict_payloads(history, full // 2)
    left = in_ledger(history)
    assert left == list(range(left[0], 200)), "the oldest rounds are evicted first"
    assert full // 4 < archive_index.ledger_bytes(history.query) <= full // 2
    with history.borrow_writer() as writer:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert (history.path / ledger.FILE).stat().st_size < 0.6 * full, "the space is released"
    assert verify(history.path).clean


def padded(record: Record, number: int) -> Record:
    """Return a record of about 60 kB that does not compress."""
    random = np.random.default_rng(number)
    tensors = {
        "support_x": random.standard_normal((120, 60)).astype("f4"),
        "support_y": np.zeros(120, "i8"),
        "query_x": random.standard_normal((120, 60)).astype("f4"),
        "query_y": np.zeros(120, "i8"),
    }
    return record._replace(payload=save(tensors), id=f"padded-{number}")


def test_a_damaged_payload_is_not_sealed_and_stays(filled: History) -> None:
    with filled.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = x'00' WHERE round = 7")
    seal_all(filled)
    evict_payloads(filled, 0)
    assert in_ledger(filled) == [7, 20, 21, 22]
    assert evict_payloads(filled, 0) == 0
    found = verify(filled.path)
    assert (found.damaged, found.missing, found.archive) == ((7,), (), ())
    with pytest.raises(HistoryDamaged, match="round 7 is not what was written"):
        filled.payload(7)


def test_nothing_leaves_the_ledger_for_a_damaged_segment(filled: History) -> None:
    marker = seal_next(filled, FIVE)
    assert marker is not None
    file = filled.path / "archive" / "segments" / marker.name / "query_y" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(HistoryDamaged, match="query_y/c/0 is damaged; verify the history with --repair"):
        evict_payloads(filled, 0)
    assert in_ledger(filled) == list(range(ROUNDS))


def test_a_kill_between_archive_and_ledger_leaves_no_trace(filled: History) -> None:
    marker = seal_next(filled, FIVE)
    with filled.borrow_writer() as writer:
        writer.execute("DELETE FROM segments")
    assert remove_orphans(filled) == []
    assert filled.archive.names() == []
    assert seal_next(filled, FIVE) == marker


def test_the_only_copy_of_a_round_is_never_removed(filled: History) -> None:
    seal_all(filled)
    evict_payloads(filled, 0)
    markers = [filled.archive.marker(name) for name in filled.archive.names()]
    with filled.borrow_writer() as writer:
        writer.execute("DELETE FROM segments")
    assert remove_orphans(filled) == markers
    assert filled.archive.names() == [marker.name for marker in markers]


def test_maintenance_runs_while_rounds_arrive_and_are_read(history: History, make_record: Make) -> None:
    maintenance = Maintenance(history, FIVE, RetentionSettings(), lambda: 0)
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        with History.open(history.path, write=False) as reader:
            while not stop.is_set():
                wrong.extend(n for n in range(len(reader)) if reader.payload(n) != make_record(n).payload)

    reading = threading.Thread(target=read)
    reading.start()
    for n in range(60):
        history.append([make_record(n)])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while in_ledger(history) and time.monotonic() < deadline:
        time.sleep(0.05)
    maintenance.close()
    stop.set()
    reading.join()
    assert in_ledger(history) == []
    assert wrong == []
    assert verify(history.path).clean


def test_rounds_go_to_an_object_store_and_come_back(filled: History, server: BucketServer, tmp_path: Path) -> None:
    set_archive(filled, server._replace(url=f"{server.url}/{tmp_path.name}"))
    before = [filled.payload(round) for round in range(ROUNDS)]
    seal_all(filled)
    evict_payloads(filled, 0)
    with History.open(filled.path, write=False) as reader:
        assert [reader.payload(round) for round in range(ROUNDS)] == before
    assert verify(filled.path).clean


def test_sealing_waits_for_an_unreachable_object_store(filled: History, tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path / "log", port) as server:
        set_archive(filled, server._replace(options={**server.options, "retry_config": {"max_retries": 0}}))
        seal_all(filled)
        evict_payloads(filled, 0)
    with History.open(filled.path, write=False) as reader, pytest.raises(ArchiveUnreachable, match="cannot be reached"):
        reader.payload(3)
    with pytest.raises(ArchiveUnreachable):
        verify(filled.path)


def test_the_archive_stays_where_its_segments_are(filled: History, tmp_path: Path) -> None:
    with filled.borrow_writer() as writer:
        record_location(writer, Location("elsewhere"))
    seal_next(filled, FIVE)
    assert (filled.path / "elsewhere" / "markers").is_dir()
    with filled.borrow_writer() as writer:
        record_location(writer, Location("elsewhere"))
        with pytest.raises(ArchiveMoved, match="archive is 's3://b/c', but rounds of this history lie in 'elsewhere'"):
            record_location(writer, Location("s3://b/c"))
        with pytest.raises(ArchiveMoved, match="the folder 'archive' next to the ledger, but"):
            record_location(writer, Location())


def downgrade_to_format_1(folder: Path) -> None:
    connection = sqlite3.connect(folder / ledger.FILE, isolation_level=None)
    dropped = [f"DROP TABLE {name}" for name in ("segments", "thinned", "held", "decisions")]
    for statement in (*dropped, "ALTER TABLE rounds DROP COLUMN bytes", "PRAGMA user_version = 1"):
        connection.execute(statement)
    connection.close()


def read_version(folder: Path) -> int:
    connection = sqlite3.connect(folder / ledger.FILE)
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(found)


def test_a_ledger_of_format_1_is_readable_and_is_migrated_on_writing(tmp_path: Path, make_record: Make) -> None:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n) for n in range(ROUNDS)])
    downgrade_to_format_1(tmp_path)
    with History.open(tmp_path, write=False) as reader:
        assert reader.payload(3) == make_record(3).payload
        assert reader.size_bytes() > 0
    assert verify(tmp_path).clean
    assert read_version(tmp_path) == 1
    with History.open(tmp_path, write=True) as history:
        assert read_version(tmp_path) == 2
        assert history.query("SELECT count(*) FROM rounds WHERE bytes > 0") == [(ROUNDS,)]
        seal_all(history)
        evict_payloads(history, 0)
        assert history.payload(3) == make_record(3).payload
        assert history.append([make_record(3)])[0].round == 3
    assert verify(tmp_path).clean


def test_rounds_that_retention_has_emptied_are_skipped(filled: History) -> None:
    with filled.borrow_writer() as writer:
        writer.execute("INSERT INTO decisions VALUES (20)")
        writer.execute("DELETE FROM payloads WHERE round < 12")
    assert seal_all(filled) == 2
    assert filled.query("SELECT first, last FROM segments ORDER BY first") == [(12, 16), (17, 21)]


def test_unreadable_rounds_are_reported(filled: History) -> None:
    with filled.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = x'00' WHERE round < 5")
    with pytest.raises(HistoryDamaged, match="none of the rounds 0 to 4 can be read"):
        seal_next(filled, FIVE)
