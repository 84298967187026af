import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from streams.history import errors, ledger
from streams.history.errors import HistoryMissing
from streams.history.history import History
from streams.history.verify import Verification, verify
from streams.types import Record


@pytest.fixture
def folder(tmp_path: Path, make_record: Callable[..., Record]) -> Path:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n) for n in range(6)])
    return tmp_path


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / ledger.FILE, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_an_intact_history_is_clean_and_progress_is_reported(folder: Path) -> None:
    progress: list[tuple[int, int]] = []
    found = verify(folder, lambda done, all: progress.append((done, all)))
    assert found == Verification(6, (), (), (), (), (), ())
    assert found.clean
    assert progress == [(6, 6)]


def test_an_empty_history_is_clean_and_a_missing_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(HistoryMissing):
        verify(tmp_path)
    with History.open(tmp_path, write=True) as history:
        assert verify(tmp_path) == Verification(0, (), (), (), (), (), ())
        assert len(history) == 0


@pytest.mark.parametrize(
    ("statements", "field", "rounds"),
    [
        (["DELETE FROM rounds WHERE round = 2", "DELETE FROM payloads WHERE round = 2"], "gaps", (2,)),
        (["DELETE FROM payloads WHERE round IN (1, 3)"], "missing", (1, 3)),
        (["UPDATE payloads SET payload = x'00' WHERE round = 4"], "damaged", (4,)),
        (["UPDATE payloads SET payload = 'text' WHERE round = 4"], "damaged", (4,)),
        (["UPDATE rounds SET crc = 0 WHERE round = 0"], "damaged", (0,)),
        (["UPDATE rounds SET id = 'a b' WHERE round = 5"], "ids", (5,)),
        (["INSERT INTO payloads VALUES (6, x'00')"], "stray", (6,)),
        (["DELETE FROM rounds WHERE round = 5"], "stray", (5,)),
    ],
)
def test_each_fault_is_found_at_its_round(
    folder: Path, statements: list[str], field: str, rounds: tuple[int, ...]
) -> None:
    change(folder, *statements)
    found = verify(folder)
    assert not found.clean
    assert getattr(found, field) == rounds
    others = {"missing", "damaged", "ids"} - {field}
    assert all(getattr(found, other) == () for other in others)


def test_an_index_with_wrong_entries_is_found(folder: Path) -> None:
    file = folder / ledger.FILE
    connection = sqlite3.connect(file)
    found = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_rounds_1'").fetchall()
    connection.close()
    first = (found[0][0] - 1) * ledger.PAGE_BYTES
    image = bytearray(file.read_bytes())
    at = image.index(b"task-5", first, first + ledger.PAGE_BYTES)
    image[at : at + 6] = b"task-x"
    file.write_bytes(image)
    assert verify(folder).ids == (5,)


def test_an_invalid_payload_with_a_right_checksum_is_damage(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(0), make_record(1)._replace(payload=b"not a task")])
    assert verify(tmp_path).damaged == (1,)


def test_a_flipped_bit_in_a_payload_is_found(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    marker = os.urandom(16)
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n)._replace(payload=marker + bytes([n]) * 30_000) for n in range(4)])
    file = tmp_path / ledger.FILE
    image = bytearray(file.read_bytes())
    at = image.index(marker + bytes([2]) * 10)
    image[at + 12_000] ^= 1
    file.write_bytes(image)
    with History.open(tmp_path, write=False) as history:
        readable = [n for n in range(4) if _reads(history, n)]
    assert readable == [0, 1, 3]
    assert not verify(tmp_path).clean


def _reads(history: History, round: int) -> bool:
    try:
        history.payload(round)
    except errors.HistoryDamaged as error:
        return f"round {round}" not in str(error)
    return True


@pytest.mark.parametrize("seed", range(8))
def test_lost_pages_never_break_the_verification(folder: Path, seed: int) -> None:
    file = folder / ledger.FILE
    pages = file.stat().st_size // ledger.PAGE_BYTES
    page = 1 + seed % (pages - 1)
    with file.open("r+b") as opened:
        opened.seek(page * ledger.PAGE_BYTES)
        opened.write(os.urandom(ledger.PAGE_BYTES) if seed % 2 else bytes(ledger.PAGE_BYTES))
    assert not verify(folder).clean or page_is_unused(file, page)


def page_is_unused(file: Path, page: int) -> bool:
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    used = {row[0] for row in connection.execute("SELECT rootpage FROM sqlite_master")}
    connection.close()
    return page + 1 not in used


def test_verify_works_while_a_writer_runs(folder: Path, make_record: Callable[..., Record]) -> None:
    with History.open(folder, write=True) as history:

        def append(done: int, all: int) -> None:
            history.append([make_record(100)])

        found = verify(folder, append)
        assert found == Verification(6, (), (), (), (), (), ())
        assert verify(folder).rounds == 7
