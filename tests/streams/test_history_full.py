import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from streams.history import ledger
from streams.history.errors import HistoryDamaged, HistoryFull
from streams.history.ledger import translate_errors

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(ledger.__file__).parents[2])}


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no private mounts here (unshare -rm): no disk that is really full")
@pytest.mark.parametrize("size", ["14m", "40m"])  # full before and after the first WAL checkpoint
def test_a_full_disk_loses_nothing_and_recovers_with_space(tmp_path: Path, size: str) -> None:
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && exec "$3" "$4" tmpfs "$2"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", size, tmp_path, sys.executable, HERE / "fill_disk.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "ok\n", done.stderr


def test_a_file_at_its_size_limit_loses_nothing_and_recovers_with_space(tmp_path: Path) -> None:
    command = [sys.executable, HERE / "fill_disk.py", "limit", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_error_of_a_full_disk_is_recognised(number: int) -> None:
    with pytest.raises(HistoryFull, match="free some space"), translate_errors(Path("ledger")):
        raise OSError(number, "no")


def test_other_errors_are_not_a_full_disk() -> None:
    with pytest.raises(PermissionError), translate_errors(Path("ledger")):
        raise PermissionError(errno.EACCES, "no")
    for code, expected in [
        (sqlite3.SQLITE_BUSY, sqlite3.OperationalError),
        (sqlite3.SQLITE_IOERR_READ, sqlite3.OperationalError),
        (sqlite3.SQLITE_CORRUPT, HistoryDamaged),
        (sqlite3.SQLITE_IOERR_WRITE, HistoryFull),
    ]:
        error = sqlite3.OperationalError("no")
        error.sqlite_errorcode = code
        with pytest.raises(expected), translate_errors(Path("ledger")):
            raise error
