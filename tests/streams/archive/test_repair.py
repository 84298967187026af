"""Data with a second copy is repaired; data without one is named and left as it is."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.history import ledger
from streams.history.archive_index import Location
from streams.history.errors import HistoryBusy, HistoryError
from streams.history.history import History
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.history.verify import Repairs, rebuild_ledger, repair, verify
from streams.types import Record

Make = Callable[..., Record]
FIVE = SealingSettings(segment_rounds=5)
ROUNDS = 13


@pytest.fixture(params=[False, True], ids=["in both", "archive only"])
def evicted(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def folder(tmp_path: Path, make_record: Make, evicted: bool) -> Iterator[Path]:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n, cursor=str(n)) for n in range(ROUNDS)])
        while seal_next(history, FIVE):
            pass
        if evicted:
            evict_payloads(history, 0)
    return tmp_path


def is_intact(folder: Path, make_record: Make) -> bool:
    with History.open(folder, write=False) as history:
        return [history.payload(n) for n in range(len(history))] == [make_record(n).payload for n in range(ROUNDS)]


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / ledger.FILE, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def damage_segment(folder: Path, file: str) -> str:
    """Flip a byte in a file of the second segment; return the segment's name."""
    name = sorted(path.name for path in (folder / "archive" / "segments").iterdir())[1]
    path = folder / "archive" / "segments" / name / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return name


def test_an_intact_history_needs_no_repair(folder: Path, make_record: Make) -> None:
    assert repair(folder, verify(folder)) == Repairs((), (), (), ())
    assert is_intact(folder, make_record)


@pytest.mark.parametrize("evicted", [False])
def test_a_damaged_payload_is_restored_from_the_archive(folder: Path, make_record: Make) -> None:
    change(
        folder, "UPDATE payloads SET payload = x'00' WHERE round IN (3, 12)", "INSERT INTO payloads VALUES (99, x'')"
    )
    found = verify(folder)
    assert (found.damaged, found.stray, found.archive) == ((3, 12), (99,), ())
    assert repair(folder, found) == Repairs((3,), (), (99,), ())
    assert verify(folder).damaged == (12,), "the round is not sealed yet, so it has no second copy"
    with History.open(folder, write=False) as history:
        assert history.payload(3) == make_record(3).payload


@pytest.mark.parametrize("file", ["support_x/c/0", "zarr.json", "digest/c/0/0", "header_end/zarr.json"])
def test_a_damaged_segment_is_rewritten_if_the_ledger_has_all_its_rounds(
    folder: Path, make_record: Make, evicted: bool, file: str
) -> None:
    name = damage_segment(folder, file)
    found = verify(folder)
    assert not found.clean
    assert all(wrong.startswith((name, f"the segment {name}")) for wrong in found.archive)
    done = repair(folder, found)
    if evicted:
        assert done == Repairs((), (), (), (name,))
        assert verify(folder) == found, "repair does not touch an only copy"
        return
    assert done == Repairs((), (f"{name[:-1]}1",), (), ())
    assert verify(folder).clean
    assert is_intact(folder, make_record)


def test_lost_rounds_are_named(folder: Path, evicted: bool) -> None:
    name = sorted(path.name for path in (folder / "archive" / "segments").iterdir())[1]
    shutil.rmtree(folder / "archive" / "segments" / name)
    found = verify(folder)
    assert found.missing == (tuple(range(5, 10)) if evicted else ())
    assert any(name in wrong for wrong in found.archive)


def test_a_segment_missing_from_the_ledger_is_recorded_again(folder: Path, make_record: Make) -> None:
    change(folder, "DELETE FROM segments WHERE first = 5")
    repair(folder, verify(folder))
    assert verify(folder).clean
    assert is_intact(folder, make_record)


def test_a_segment_of_another_history_is_detected(folder: Path) -> None:
    change(folder, "UPDATE rounds SET id = 'other' WHERE round = 6")
    assert any("round 6 differs from the ledger" in wrong for wrong in verify(folder).archive)


def test_a_lost_ledger_is_rebuilt_from_the_archive(folder: Path, make_record: Make) -> None:
    with History.open(folder, write=False) as history:
        entries = [history.entry(n) for n in range(10)]
    with pytest.raises(HistoryError, match="move it away"):
        rebuild_ledger(folder, Location())
    (folder / ledger.FILE).unlink()
    assert rebuild_ledger(folder, Location()) == 10
    assert sorted(path.name for path in folder.iterdir()) == ["archive", ledger.FILE, ledger.WRITER_LOCK]
    assert verify(folder).clean
    with History.open(folder, write=True) as history:
        assert [history.entry(n) for n in range(10)] == entries
        assert [history.payload(n) for n in range(10)] == [make_record(n).payload for n in range(10)]
        assert history.cursor("s") == "9", "the source sends again what was lost with the ledger"
        assert history.append([make_record(4)])[0].duplicate
        assert history.append([make_record(11)])[0].round == 10


def test_only_a_stopped_history_is_repaired(folder: Path) -> None:
    found = verify(folder)
    with History.open(folder, write=True), pytest.raises(HistoryBusy):
        repair(folder, found)
