import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.sources import files
from streams.spec import Limits, TaskSpec
from streams.types import Arrival
from tests.support.ingesting import Faulty, until

SPEC = TaskSpec(x_shape=(2,), ways=3)


@pytest.fixture
def drop(tmp_path: Path, make_task: Callable[[int], Task]) -> Callable[..., Path]:
    def put(name: str, body: bytes | None = None) -> Path:
        part, file = tmp_path / f".{name}", tmp_path / name
        part.write_bytes(wire.encode(make_task(len(name))) if body is None else body)
        return part.rename(file)

    return put


def spool(folder: Path, now: list[float] | None = None, **options: object) -> files.Spool:
    clock = (lambda: now[0]) if now else (lambda: 0.0)
    return replace(files.create_source(files.Settings(str(folder), **options), SPEC, "spool", 0), clock=clock)


def listing(stream: Iterator[Arrival | None]) -> list[str]:
    """Return the ids up to the next None."""
    return [one.id for one in iter(lambda: next(stream), None)]


def test_files_are_read_once_in_name_order_and_stay(tmp_path: Path, drop: Callable[..., Path]) -> None:
    now = [0.0]
    for name in ("b.safetensors", "a.x.safetensors", ".hidden.safetensors", "c.safetensors.tmp", "d.txt"):
        drop(name)
    (tmp_path / "folder.safetensors").mkdir()
    stream = spool(tmp_path, now).read(None)
    assert listing(stream) == ["a.x", "b"]
    drop("0.safetensors")
    assert listing(stream) == [], "the folder is not listed again before poll_seconds"
    now[0] = 0.5
    assert listing(stream) == ["0"], "a late file with an earlier name is not lost"
    drop("b.safetensors", b"other bytes")
    now[0] = 1.0
    assert listing(stream) == ["b"], "a replaced file is read again"
    assert sorted(file.name for file in tmp_path.glob("[0-9a-b]*")) == [
        "0.safetensors",
        "a.x.safetensors",
        "b.safetensors",
    ]
    assert listing(spool(tmp_path).read("ignored")) == ["0", "a.x", "b"]


def test_missing_and_unreadable_files_are_not_fatal(
    tmp_path: Path, drop: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    for name in ("a.safetensors", "b.safetensors", "d.safetensors"):
        drop(name, b"1234")
    big = drop("c.safetensors", b"12345")
    stream = spool(tmp_path, now, max_bytes=4).read(None)
    assert next(stream).id == "a"
    (tmp_path / "b.safetensors").unlink()
    assert listing(stream) == ["d"]
    assert caplog.text.count("skipped until it can be read") == 1
    for second in (1.0, 2.0):
        now[0] = second
        assert listing(stream) == []
    assert caplog.text.count("skipped until it can be read") == 1
    os.truncate(big, 3)
    now[0] = 3.0
    assert listing(stream) == ["c"]


def test_a_missing_folder_raises_so_that_the_reader_retries(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(spool(tmp_path / "none").read(None))


def test_a_spool_folder_is_ingested_once_across_restarts(
    tmp_path: Path, drop: Callable[..., Path], history: History, spec: TaskSpec
) -> None:
    for name in ("b.safetensors", "bad name.safetensors", "a.safetensors", "broken.safetensors"):
        drop(name, b"nonsense" if name.startswith("broken") else None)
    rejected: list[tuple[str, str]] = []
    for restart, expected in enumerate([["a", "b"], ["a", "b", "late"]]):
        ingest = Ingest(history, spec, Limits(), lambda: 0, lambda *said: rejected.append(said), lambda *said: None)
        ingest.pull("spool", files.create_source(files.Settings(str(tmp_path), poll_seconds=0.01), spec, "spool", 0))
        until(lambda ids=expected, refused=2 * (restart + 1): len(history) >= len(ids) and len(rejected) >= refused)
        ingest.close()
        assert [history.entry(n).id for n in range(len(history))] == expected
        drop("late.safetensors")
    assert sorted(rejected) == [("spool", "bad_id")] * 2 + [("spool", "unreadable")] * 2


def arrays_of(task: Task) -> dict[str, np.ndarray]:
    tensors = (*task.support, *task.query)
    return {name: tensor.numpy() for name, tensor in zip(wire.SUPPORT + wire.QUERY, tensors, strict=True)}


def as_npz(task: Task) -> bytes:
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays_of(task))
    return buffer.getvalue()


def as_arrow(task: Task) -> bytes:
    x, y = (torch.cat([getattr(half, name) for half in task]).numpy() for name in "xy")
    query = np.arange(len(y)) >= len(task.support.y)
    columns = {"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 2), "y": pa.array(y), "query": query}
    table, buffer = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue().to_pybytes()


def test_every_format_is_the_same_task(
    tmp_path: Path, drop: Callable[..., Path], make_task: Callable[[int], Task]
) -> None:
    task = make_task(5)
    for name, body in {"a.safetensors": wire.encode(task), "b.npz": as_npz(task), "c.arrow": as_arrow(task)}.items():
        drop(name, body)
    stream = spool(tmp_path).read(None)
    arrivals = list(iter(lambda: next(stream), None))
    assert [arrival.id for arrival in arrivals] == ["a", "b", "c"]
    for arrival in arrivals:
        found = wire.decode(arrival.body, SPEC, Limits())
        assert wire.encode(found) == wire.encode(task)
        assert arrival.rejection is None


def test_a_file_with_a_wrong_format_is_refused_with_its_own_bytes(tmp_path: Path, drop: Callable[..., Path]) -> None:
    drop("a.npz", b"PK\x03\x04 no")
    drop("b.arrow", b"no arrow")
    first, second = list(iter(partial(next, spool(tmp_path).read(None)), None))
    assert (first.id, first.body, first.rejection.reason) == ("a", b"PK\x03\x04 no", "unreadable")
    assert (second.id, second.body, second.rejection.reason) == ("b", b"no arrow", "unreadable")


def test_without_pyarrow_arrow_files_wait(
    tmp_path: Path, drop: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drop("a.arrow")
    drop("b.safetensors")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert listing(spool(tmp_path).read(None)) == ["b"]
    assert "pip install 'online-meta[arrow]'" in caplog.text


class MovingSpool:
    """A run with a spool folder that moves its files, read into a history as by the daemon; it can be restarted."""

    def __init__(self, folder: Path, history: History, spec: TaskSpec) -> None:
        self.folder, self.history, self.spec = folder, history, spec
        self.rejected: list[tuple[str, str]] = []

    def begin(self, spool: files.Spool | None = None) -> Ingest:
        count = lambda *said: self.rejected.append(said)  # noqa: E731
        ingest = Ingest(self.history, self.spec, Limits(), lambda: 0, count, lambda *said: None)
        settings = files.Settings(str(self.folder), poll_seconds=0.01, processed="move")
        ingest.pull("spool", spool or files.create_source(settings, self.spec, "spool", 0))
        return ingest

    def names(self, folder: str = "") -> list[str]:
        where = self.folder / folder
        return sorted(file.name for file in where.iterdir() if file.is_file()) if where.exists() else []

    def run_until(self, names: list[str]) -> None:
        ingest = self.begin()
        until(lambda: self.names() == names)
        ingest.close()


@pytest.fixture
def moving(tmp_path: Path, history: History, spec: TaskSpec) -> MovingSpool:
    return MovingSpool(tmp_path, history, spec)


def test_files_are_moved_once_durable_or_refused(moving: MovingSpool, drop: Callable[..., Path]) -> None:
    for name in ("a.safetensors", "b.npz", "c d.safetensors", "e.safetensors"):
        drop(name, b"nonsense" if name[0] in "be" else None)
    drop("keep.txt", b"not a task")
    moving.run_until(["keep.txt"])
    assert moving.names("done") == ["a.safetensors"]
    assert moving.names("rejected") == ["b.npz", "c d.safetensors", "e.safetensors"]
    assert len(moving.history) == 1
    drop("a.safetensors")
    moving.run_until(["keep.txt"])
    assert len(moving.names("done")) == 2, "a duplicate is moved as well, next to its namesake"
    drop("a.safetensors", wire.encode(Task(*[Batch(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))] * 2)))
    moving.run_until(["keep.txt"])
    assert "a.safetensors" in moving.names("rejected"), "other bytes under a known id"
    assert len(moving.history) == 1
    assert [reason for _, reason in moving.rejected].count("conflict") == 1


def test_a_committed_file_that_was_not_moved_is_moved_after_a_restart(
    moving: MovingSpool, drop: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        drop(name, wire.encode(Task(*[Batch(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))] * 2)))
    with monkeypatch.context() as broken:
        broken.setattr(files.Spool, "ack", lambda self, arrivals: None)  # like a kill between commit and move
        ingest = moving.begin()
        until(lambda: len(moving.history) == 2)
        ingest.close()
    assert moving.names("done") == []
    moving.run_until([])
    assert moving.names("done") == ["a.safetensors", "b.safetensors"]
    assert len(moving.history) == 2
    assert moving.rejected == []


def test_a_file_is_not_moved_before_its_task_is_durable(
    tmp_path: Path, drop: Callable[..., Path], faulty: Faulty, spec: TaskSpec
) -> None:
    drop("a.safetensors")
    faulty.gate = threading.Event()
    moving = MovingSpool(tmp_path, faulty, spec)
    ingest = moving.begin()
    until(lambda: ingest._committer._pending == 1)
    assert moving.names() == ["a.safetensors"]
    assert moving.names("done") == []
    faulty.gate.set()
    until(lambda: moving.names("done") == ["a.safetensors"])
    ingest.close()


def test_a_file_replaced_after_reading_is_not_moved_unread(tmp_path: Path, drop: Callable[..., Path]) -> None:
    one = spool(tmp_path, processed="move")
    drop("a.safetensors")
    arrival = next(one.read(None))
    (tmp_path / "a.safetensors").rename(tmp_path / "old")
    drop("a.safetensors", b"new")
    one.ack([arrival])
    assert (tmp_path / "a.safetensors").read_bytes() == b"new"


def test_two_files_with_one_id_wait_for_each_other(tmp_path: Path, drop: Callable[..., Path]) -> None:
    now = [0.0]
    one = spool(tmp_path, now, processed="move")
    drop("a.npz")
    drop("a.safetensors")
    stream = one.read(None)
    first = list(iter(lambda: next(stream), None))
    assert [arrival.id for arrival in first] == ["a"]
    one.ack(first)
    now[0] = 1.0
    second = list(iter(lambda: next(stream), None))
    assert [arrival.id for arrival in second] == ["a"]
    one.ack(second)
    assert sorted(path.name for path in tmp_path.rglob("a.*")) == ["a.npz", "a.safetensors"]
    assert not list(tmp_path.glob("a.*"))


def test_a_failed_move_is_reported_and_a_missing_file_is_not(
    tmp_path: Path, drop: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    one = spool(tmp_path, processed="move")
    for name in ("a.safetensors", "b.safetensors"):
        drop(name)
    stream = one.read(None)
    arrivals = list(iter(lambda: next(stream), None))
    (tmp_path / "done").write_text("no folder")
    (tmp_path / "a.safetensors").unlink()
    one.ack(arrivals)
    assert caplog.text.count("cannot be moved") == 1
    assert (tmp_path / "b.safetensors").exists()


REAL = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))


def test_a_csv_or_jsonl_file_is_one_task(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("height,name,width,power\n1,p,2,3\n4,q,5,6\n7,r,8,9\n\n")
    (tmp_path / "b.csv").write_text("height,width,power,query\n1,2,3,0\n4,5,6,1\n")
    (tmp_path / "c.jsonl").write_text('{"height": 1, "width": 2, "power": 3}\n{"height": 4, "width": 5, "power": 6}')
    settings = files.Settings(str(tmp_path), x=("height", "width"), y=("power",))
    stream = files.create_source(settings, REAL, "spool", 0).read(None)
    found = {one.id: one for one in iter(lambda: next(stream), None)}
    assert {one.rejection for one in found.values()} == {None}
    tasks = {id: wire.decode(one.body, REAL, Limits()) for id, one in found.items()}
    assert sorted(torch.cat([batch.x for batch in tasks["a"]]).tolist()) == [[1, 2], [4, 5], [7, 8]]
    assert [batch.x.tolist() + batch.y.tolist() for batch in tasks["b"]] == [[[1, 2], [3]], [[4, 5], [6]]]
    assert [batch.y.tolist() for batch in tasks["c"]] == [[[3]], [[6]]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,z\n1,2\n", "a.csv has no columns 'y'; it has x, z"),
        ("a.csv", "", "a.csv is empty; its first line must name the columns"),
        ("a.csv", "x,y\n", "the file has no rows"),
        ("a.csv", "x,y\n1,2\n1\n", "the row at 8 cannot be read: it has 1 cells; the header has 2"),
        ("a.csv", "x,y\n1,tall\n", "column 'y': 'tall' is not a number"),
        ("a.csv", "x,y,query\n1,2,maybe\n", "query = 'maybe'; it must be 1 or true, 0 or false"),
        ("a.jsonl", '{"x": 1}\n', "it has no 'y'"),
        ("a.jsonl", "[1]\n", "it is not a JSON object"),
    ],
)
def test_a_file_of_lines_that_is_no_task_is_refused_and_says_why(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    spec = TaskSpec(x_shape=(), y="real", y_shape=())
    stream = files.create_source(files.Settings(str(tmp_path)), spec, "spool", 0).read(None)
    arrival = next(stream)
    assert arrival is not None
    assert arrival.rejection is not None
    assert message in arrival.rejection.detail
    assert arrival.body == text.encode()


def test_what_is_ignored_is_said_once_with_the_reason(
    tmp_path: Path, drop: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    for name in ("a.safetensors", "b.pt", ".c.safetensors"):
        drop(name)
    for folder in ("d.npz", "done", "rejected"):
        (tmp_path / folder).mkdir()
    source = spool(tmp_path, now)
    stream = source.read(None)
    assert listing(stream) == ["a"]
    now[0] = 1.0
    assert listing(stream) == []
    suffixes = ".safetensors, .npz, .arrow, .csv, .jsonl"
    assert source.omissions() == [
        ".c.safetensors: its name begins with a dot, as while a file is written; rename it when it is complete",
        f"b.pt: its name ends with none of {suffixes}",
        "d.npz: it is a folder; only files directly in the folder are read",
    ]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"the source spool ignores {tmp_path}/b.pt: its name ends with none of {suffixes}",
        f"the source spool ignores {tmp_path}/d.npz: it is a folder; only files directly in the folder are read",
    ]
    for number in range(30):
        drop(f"{number:02}.txt")
    now[0] = 2.0
    assert listing(stream) == []
    assert source.omissions()[-1] == "and 13 more"
    assert len(source.omissions()) == 21
