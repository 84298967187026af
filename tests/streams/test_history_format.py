import hashlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from streams.history import ledger
from streams.history.errors import HistoryDamaged, HistoryError, HistoryFormatError, HistoryMissing
from streams.history.history import History
from streams.history.verify import verify
from streams.types import Record

Make = Callable[..., Record]


def test_a_missing_history_is_a_clear_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(HistoryMissing, match="no history here"):
            History.open(folder, write=False)
    assert list(tmp_path.iterdir()) == []


def sqlite_file(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file, isolation_level=None)
    for statement in statements:
        connection.execute(statement).fetchall()
    connection.close()


def format_7(folder: Path) -> None:
    History.open(folder, write=True).close()
    sqlite_file(folder / ledger.FILE, "PRAGMA user_version = 7")


def format_7_in_the_log(folder: Path) -> None:
    """Leave the files of a killed writer of a later version: the new version is in the log only."""
    source = folder / "source"
    History.open(source, write=True).close()
    connection = sqlite3.connect(source / ledger.FILE, isolation_level=None)
    connection.execute("PRAGMA user_version = 7")
    for name in (ledger.FILE, f"{ledger.FILE}-wal"):
        (folder / name).write_bytes((source / name).read_bytes())
    connection.close()


FOREIGN = {
    "format 7; this version reads 1 and 2": lambda folder: format_7(folder),
    "has format 7": lambda folder: format_7_in_the_log(folder),
    "an SQLite database of another program": lambda folder: sqlite_file(folder / ledger.FILE, "CREATE TABLE t (a)"),
    "database of another program": lambda folder: sqlite_file(
        folder / ledger.FILE, "PRAGMA journal_mode=wal", "CREATE TABLE t (a)"
    ),
    "not an SQLite database": lambda folder: (folder / ledger.FILE).write_bytes(b"hello, world" * 1000) and None,
    "is not a history": lambda folder: (folder / ledger.FILE).write_bytes(b"hello"),
    "of another program": lambda folder: (folder / ledger.FILE).touch(),
}


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("message", FOREIGN)
def test_a_file_that_is_not_a_history_of_this_format_is_left_untouched(
    tmp_path: Path, message: str, write: bool
) -> None:
    FOREIGN[message](tmp_path)
    before = contents(tmp_path)
    with pytest.raises(HistoryFormatError, match=message):
        History.open(tmp_path, write=write)
    with pytest.raises(HistoryFormatError, match=message):
        verify(tmp_path)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, str]:
    """Hash all files except the shared memory and the empty log, which SQLite creates even for reading."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.endswith("-shm")]
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.stat().st_size or "-" not in file.name
    }


def test_a_log_without_its_database_is_not_overwritten(tmp_path: Path) -> None:
    log = tmp_path / f"{ledger.FILE}-wal"
    log.write_bytes(b"rounds")
    with pytest.raises(HistoryDamaged, match="has lost its"):
        History.open(tmp_path, write=True)
    assert log.read_bytes() == b"rounds"


def test_an_interrupted_creation_starts_again(tmp_path: Path, make_record: Make) -> None:
    (tmp_path / f".new-{ledger.FILE}").write_bytes(b"SQLite format 3\x00 half of it")
    (tmp_path / f".new-{ledger.FILE}-journal").write_bytes(b"half")
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(0)])
    assert sorted(file.name for file in tmp_path.iterdir()) == [ledger.FILE, "writer.lock"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE payloads SET payload = zeroblob(length(payload)) WHERE round = 1", "round 1 is not what was written"),
        ("UPDATE rounds SET crc = crc + 1 WHERE round = 1", "round 1 is not what was written"),
        ("DELETE FROM payloads WHERE round = 1", "round 1: its payload is lost"),
    ],
)
def test_damage_is_detected_and_named(tmp_path: Path, make_record: Make, statement: str, message: str) -> None:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n) for n in range(3)])
    sqlite_file(tmp_path / ledger.FILE, statement)
    with History.open(tmp_path, write=False) as history:
        with pytest.raises(HistoryDamaged, match=message):
            history[1]
        assert history[0].support.x.shape == history[2].support.x.shape


def test_an_invalid_payload_is_damage(history: History, make_record: Make) -> None:
    history.append([make_record(0)._replace(payload=b"not a task")])
    with pytest.raises(HistoryDamaged, match="round 0 cannot be decoded"):
        history[0]


def test_a_file_with_lost_pages_is_damage(tmp_path: Path, make_record: Make) -> None:
    with History.open(tmp_path, write=True) as history:
        history.append([make_record(n)._replace(payload=os.urandom(40_000)) for n in range(20)])
    file = tmp_path / ledger.FILE
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(HistoryDamaged):
        read_all(tmp_path)


def read_all(folder: Path) -> None:
    with History.open(folder, write=False) as history:
        for round in range(len(history)):
            history.payload(round)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_reader_without_write_permission_gets_a_clear_error(make_record: Make) -> None:
    code = (
        "import os, sys; from streams.history.history import History, ledger\n"
        "os.setuid(65534)\n"
        "try: History.open(sys.argv[1], write=False)\n"
        "except ledger.HistoryError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as folder:
        History.open(folder, write=True).close()
        for readable in (Path(folder), *Path(folder).rglob("*")):
            readable.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=with_path())
    assert "must be writable" in done.stdout, done.stderr
    assert issubclass(HistoryMissing, HistoryError)


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ledger.__file__).parents[2])}
