import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from online_meta.types import Task
from streams import wire
from streams.arrivals import Arrival
from streams.history import History
from streams.ingest import Ingest
from streams.sources import files
from streams.spec import Limits, TaskSpec


@pytest.fixture
def drop(tmp_path: Path, make_task: Callable[[int], Task]) -> Callable[..., Path]:
    def put(name: str, body: bytes | None = None) -> Path:
        part, file = tmp_path / f".{name}", tmp_path / name
        part.write_bytes(wire.encode(make_task(len(name))) if body is None else body)
        return part.rename(file)

    return put


def spool(folder: Path, now: list[float] | None = None, **options: int) -> files.Spool:
    clock = (lambda: now[0]) if now else (lambda: 0.0)
    return files.Spool(files.Settings(str(folder), **options), "spool", clock)


def listing(stream: Iterator[Arrival | None]) -> list[str]:
    """Return the ids up to the next None."""
    return [one.id for one in iter(lambda: next(stream), None)]


def test_files_are_offered_in_name_order_once_and_kept(tmp_path: Path, drop: Callable[..., Path]) -> None:
    now = [0.0]
    for name in ("b.safetensors", "a.x.safetensors", ".hidden.safetensors", "c.safetensors.tmp", "d.npz"):
        drop(name)
    (tmp_path / "folder.safetensors").mkdir()
    stream = spool(tmp_path, now).read(None)
    assert listing(stream) == ["a.x", "b"]
    drop("0.safetensors")
    assert listing(stream) == [], "it is not listed again before poll_seconds are over"
    now[0] = 0.5
    assert listing(stream) == ["0"], "an earlier name that came later is not lost"
    drop("b.safetensors", b"other bytes")
    now[0] = 1.0
    assert listing(stream) == ["b"], "a file that was replaced is offered again"
    assert sorted(file.name for file in tmp_path.glob("[0-9a-b]*")) == [
        "0.safetensors",
        "a.x.safetensors",
        "b.safetensors",
    ]
    assert listing(spool(tmp_path).read("ignored")) == ["0", "a.x", "b"]


def test_files_that_vanish_or_cannot_be_read_are_not_fatal(
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


def test_a_missing_folder_is_an_error_for_who_reconnects(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(spool(tmp_path / "none").read(None))


def test_a_spool_folder_is_ingested_once_whatever_is_restarted(
    tmp_path: Path, drop: Callable[..., Path], history: History, spec: TaskSpec
) -> None:
    for name in ("b.safetensors", "bad name.safetensors", "a.safetensors", "broken.safetensors"):
        drop(name, b"nonsense" if name.startswith("broken") else None)
    rejected: list[tuple[str, str]] = []
    for restart, expected in enumerate([["a", "b"], ["a", "b", "late"]]):
        ingest = Ingest(history, spec, Limits(), lambda: 0, lambda *said: rejected.append(said), lambda *said: None)
        ingest.pull("spool", files.open(files.Settings(str(tmp_path), poll_seconds=0.01), spec, "spool", 0))
        end = time.monotonic() + 20
        while len(history) < len(expected) or len(rejected) < 2 * (restart + 1):
            assert time.monotonic() < end
            time.sleep(0.002)
        ingest.close()
        assert [history.entry(n).id for n in range(len(history))] == expected
        drop("late.safetensors")
    assert sorted(rejected) == [("spool", "bad_id")] * 2 + [("spool", "unreadable")] * 2
