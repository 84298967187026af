import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from online_meta.types import Task
from streams.history import ledger
from streams.history.errors import HistoryBusy
from streams.history.history import History
from streams.history.verify import verify
from streams.types import Conflict, Receipt, Record

Make = Callable[..., Record]


def test_rounds_are_numbered_without_gaps_and_read_back(
    history: History, make_record: Make, make_task: Callable[[int], Task]
) -> None:
    receipts = history.append([make_record(n) for n in range(3)]) + history.append([make_record(3)])
    assert receipts == [Receipt(f"task-{n}", n, duplicate=False) for n in range(4)]
    assert len(history) == 4
    for n in range(4):
        assert history.payload(n) == make_record(n).payload
        assert torch.equal(history[n].query.x, make_task(n).query.x)
        assert history.find(f"task-{n}") == n
        entry = history.entry(n)
        assert (entry.round, entry.id, entry.source, entry.arrived) == (n, f"task-{n}", "s", 1000.0 + n)
        assert entry.digest == make_record(n).digest
    assert history.find("task-4") is None
    for absent in (4, -1):
        with pytest.raises(IndexError, match="not among the 4 rounds"):
            history[absent]
        with pytest.raises(IndexError):
            history.entry(absent)
    assert history.payload(np.int64(2)) == history.payload(2)
    assert history.entry(np.int64(2)) == history.entry(2)
    assert history.append([]) == []
    assert verify(history.path).clean


def test_the_same_task_again_is_the_same_round(history: History, make_record: Make) -> None:
    assert history.append([make_record(0), make_record(0), make_record(1)]) == [
        Receipt("task-0", 0, duplicate=False),
        Receipt("task-0", 0, duplicate=True),
        Receipt("task-1", 1, duplicate=False),
    ]
    assert history.append([make_record(1), make_record(2)]) == [
        Receipt("task-1", 1, duplicate=True),
        Receipt("task-2", 2, duplicate=False),
    ]


def test_other_bytes_under_a_known_id_are_a_conflict(history: History, make_record: Make) -> None:
    answers = history.append([make_record(0), make_record(9, id="task-0"), make_record(1)])
    assert answers == [Receipt("task-0", 0, False), Conflict("task-0", 0), Receipt("task-1", 1, False)]
    assert history.payload(0) == make_record(0).payload


def test_each_source_has_its_cursor_which_duplicates_and_conflicts_advance(history: History, make_record: Make) -> None:
    assert history.cursor("a") is None
    history.append([make_record(0, source="a", cursor="x0"), make_record(1, source="b", cursor="y0")])
    history.append([make_record(2, source="a"), make_record(3, source="a", cursor="x1")])
    assert (history.cursor("a"), history.cursor("b")) == ("x1", "y0")
    history.append([make_record(0, source="b", cursor="y1")])
    assert history.cursor("b") == "y1"
    history.append([make_record(7, id="task-0", source="b", cursor="y2")])
    assert history.cursor("b") == "y2"
    assert (len(history), history.cursor("c")) == (4, None)


def test_a_failed_append_leaves_nothing(history: History, make_record: Make) -> None:
    history.append([make_record(0, cursor="0")])
    poison = make_record(2)._replace(payload=None, id="poison")
    with pytest.raises(TypeError):
        history.append([make_record(1, cursor="1"), poison])
    with pytest.raises(sqlite3.IntegrityError):
        history.append([make_record(1, cursor="1"), make_record(2)._replace(digest=None)])
    assert (len(history), history.find("task-1"), history.cursor("s")) == (1, None, "0")
    assert history.append([make_record(1)]) == [Receipt("task-1", 1, False)]


def test_everything_is_there_after_reopening(tmp_path: Path, make_record: Make) -> None:
    with History.open(tmp_path / "a" / "b", write=True) as history:
        history.append([make_record(0, cursor="c0")])
    with History.open(tmp_path / "a" / "b", write=True) as history:
        assert history.append([make_record(0), make_record(1)]) == [
            Receipt("task-0", 0, True),
            Receipt("task-1", 1, False),
        ]
        assert history.cursor("s") == "c0"


def test_there_is_one_writer(tmp_path: Path, make_record: Make) -> None:
    first = History.open(tmp_path, write=True)
    for _ in range(2):
        with pytest.raises(HistoryBusy, match="already has a writer"):
            History.open(tmp_path, write=True)
    first.append([make_record(0)])
    first.close()
    first.close()
    with History.open(tmp_path, write=True) as second:
        assert len(second) == 1
    for closed in (lambda: len(first), lambda: first.append([make_record(1)])):
        with pytest.raises(ValueError, match="closed"):
            closed()


def test_a_writer_in_another_process_is_busy_too(history: History) -> None:
    code = (
        "import sys; from streams.history.history import History, ledger\n"
        "try: History.open(sys.argv[1], write=True)\n"
        "except ledger.HistoryBusy: print(len(History.open(sys.argv[1], write=False)), 'busy')"
    )
    done = subprocess.run([sys.executable, "-c", code, history.path], capture_output=True, text=True, env=with_path())
    assert done.stdout == "0 busy\n", done.stderr


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ledger.__file__).parents[2])}


def test_readers_see_commits_at_once_and_change_nothing(history: History, make_record: Make) -> None:
    with History.open(history.path, write=False) as reader:
        for n in range(5):
            history.append([make_record(n)])
            assert len(reader) == n + 1
            assert reader.payload(n) == make_record(n).payload
        with pytest.raises(ValueError, match="cannot append"):
            reader.append([make_record(9)])
        with reader._reader() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM rounds")


def test_readers_do_not_wait_for_a_write(history: History, make_record: Make) -> None:
    history.append([make_record(0)])
    history._writer.execute("BEGIN EXCLUSIVE")
    history._writer.execute("UPDATE rounds SET source = 'changed'")
    with history._writer_lock:  # held as during an append that waits for the disk
        found: list[object] = []
        reader = threading.Thread(target=lambda: found.extend([len(history), history[0], history.entry(0).source]))
        reader.start()
        reader.join(timeout=120)
    history._writer.execute("ROLLBACK")
    assert found[0] == 1
    assert found[2] == "s"


def test_many_threads_read_while_one_writes(history: History, make_record: Make) -> None:
    faults: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                last = len(history) - 1
                if last >= 0:
                    assert history.payload(last) == make_record(last).payload
                    assert history.find(f"task-{last}") == last
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for n in range(0, 120, 3):
        history.append([make_record(k) for k in range(n, n + 3)])
    done.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(history) == 120


def test_a_commit_waits_for_the_disk(history: History) -> None:
    assert history._writer.execute("PRAGMA synchronous").fetchall() == [(2,)]
    assert history._writer.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    assert history._writer.execute("PRAGMA page_size").fetchall() == [(16384,)]


def test_the_wal_is_truncated_after_a_long_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Make
) -> None:
    for module in ("ledger", "history"):
        monkeypatch.setattr(f"streams.history.{module}.MAX_WAL_BYTES", 500_000)
    with History.open(tmp_path, write=True) as history, history._reader() as long:
        big = make_record(0)._replace(payload=b"x" * 100_000)
        long.execute("BEGIN")
        assert long.execute("SELECT count(*) FROM rounds").fetchall() == [(0,)]
        for n in range(20):
            history.append([big._replace(id=f"big-{n}")])
        held = ledger.wal_size(tmp_path / ledger.FILE)
        assert held > 2_000_000
        assert long.execute("SELECT count(*) FROM rounds").fetchall() == [(0,)]
        long.execute("COMMIT")
        for n in range(20, 40):
            history.append([big._replace(id=f"big-{n}")])
        assert ledger.wal_size(tmp_path / ledger.FILE) < 1_000_000
        assert history.size_bytes() > 4_000_000
        assert len(history) == 40


def test_a_history_works_as_a_replay_buffer(history: History, make_record: Make) -> None:
    history.append([make_record(0)])
    history.remember(0, history[0])
    assert len(history) == 1
    assert len(list(iter(history))) == 1
