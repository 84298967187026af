import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from streams.atomic_files import sync_path
from streams.ingest import dead_letters
from streams.ingest.dead_letters import DeadLetters, read_letters
from streams.types import Arrival, Conflict, Receipt, Record, Rejected
from tests.support.ingesting import DEADLINE, Arrive, Counts, Faulty, Open


def letter(n: int, body: bytes | None = None, id: str = "id") -> Arrival:
    return Arrival(id, b"body %d" % n if body is None else body, "broker", None)


def refusal(n: int = 0) -> Rejected:
    return Rejected("unreadable", f"detail {n}")


def details(folder: Path) -> list[str]:
    return [known["detail"] for _, known in read_letters(folder)]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "dead-letters"


def test_a_letter_records_the_body_and_the_reason(folder: Path) -> None:
    letters = DeadLetters(folder, 10, 10_000, clock=lambda: 1_700_000_000.25)
    assert not folder.exists(), "the folder is created with the first letter"
    letters.put(letter(0), refusal())
    ((body, known),) = read_letters(folder)
    assert body.read_bytes() == b"body 0"
    assert body.name == f"20231114T221320.250000Z-000000000-{known['sha256'][:16]}.body"
    assert {key: known[key] for key in ("reason", "detail", "source", "id", "arrived")} == {
        "reason": "unreadable",
        "detail": "detail 0",
        "source": "broker",
        "id": "id",
        "arrived": 1_700_000_000.25,
    }
    assert (known["received_bytes"], known["kept_bytes"], known["cut"]) == (6, 6, False)


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "a/b", "\x00", "a\nb", "\ud800", "..", "x" * 100_000, "", "\u0430dmin"]
)
def test_an_id_is_never_part_of_a_file_name(folder: Path, id: str) -> None:
    DeadLetters(folder, 10, 10_000).put(letter(0, id=id), refusal())
    ((_, known),) = read_letters(folder)
    assert known["id"] == id[:500]
    assert sorted(path.name for path in folder.parent.parent.rglob("*") if path.is_file()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert all(set(path.name) <= set("0123456789abcdefTZ.-" + "bodyjsn") for path in folder.iterdir())


def test_a_long_body_is_truncated_and_marked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "LETTER_BYTES", 8)
    letters = DeadLetters(folder, 10, 10_000)
    letters.put(letter(0, b"x" * 9), refusal())
    letters.put(letter(0, b"x" * 8), refusal())
    letters.put(letter(0, b"half"), refusal(), complete=False)
    found = [(body.read_bytes(), known["received_bytes"], known["cut"]) for body, known in read_letters(folder)]
    assert found == [(b"x" * 8, 9, True), (b"x" * 8, 8, False), (b"half", 4, True)]


def test_the_oldest_letters_go_first_across_restarts_and_clock_jumps(folder: Path) -> None:
    clock = [2_000_000_000.0]
    for restart in range(3):
        letters = DeadLetters(folder, 4, 10_000, clock=lambda: clock[0])
        for n in range(3):
            letters.put(letter(n), refusal(3 * restart + n))
            clock[0] -= 100_000
        assert len(list(folder.iterdir())) == 2 * min(4, 3 * restart + 3)
    assert details(folder) == ["detail 5", "detail 6", "detail 7", "detail 8"]
    DeadLetters(folder, 2, 10_000)
    assert details(folder) == ["detail 7", "detail 8"], "a smaller bound applies at once"


def test_the_bound_on_bytes_always_holds(folder: Path) -> None:
    letters = DeadLetters(folder, 1000, 3_000)
    for n in range(40):
        letters.put(letter(n, bytes(50 * (n % 9))), refusal(n))
        assert size_of(folder) <= 3_000
    assert details(folder)[-1] == "detail 39"
    assert len(details(folder)) > 3
    letters.put(letter(0, bytes(5_000)), refusal(99))
    assert details(folder)[-1] == "detail 39", "a letter over the bound is dropped, and evicts no other"
    again = DeadLetters(folder, 1000, 3_000)
    again.put(letter(0, bytes(2_000)), refusal(41))
    assert size_of(folder) <= 3_000
    assert details(folder)[-1] == "detail 41"


@pytest.mark.parametrize("bounds", [(0, 100), (100, 0)])
def test_a_bound_of_zero_keeps_no_letters(folder: Path, bounds: tuple[int, int]) -> None:
    DeadLetters(folder, *bounds).put(letter(0), refusal())
    assert not folder.exists()


def test_leftovers_of_a_kill_are_removed_and_other_files_stay(folder: Path) -> None:
    letters = DeadLetters(folder, 3, 10_000)
    for n in range(3):
        letters.put(letter(n), refusal(n))
    first, second, third = sorted(folder.glob("*.json"))
    first.unlink()  # a kill before it was written
    second.rename(second.with_suffix(".json.new"))  # or a kill before it was renamed
    for name in ("notes.txt", "20231114T221320.250000Z-x-0123456789abcdef.json", ".body"):
        (folder / name).write_text("mine")
    assert details(folder) == ["detail 2"]
    letters = DeadLetters(folder, 3, 10_000)
    letters.put(letter(3), refusal(3))
    letters.put(letter(4), refusal(4))
    assert details(folder) == ["detail 2", "detail 3", "detail 4"]
    assert len(list(folder.iterdir())) == 6 + 3
    assert third.exists()


def test_unfinished_letters_are_evicted_before_finished_ones(folder: Path) -> None:
    letters = DeadLetters(folder, 3, 10_000)
    for n in range(3):
        letters.put(letter(n), refusal(n))
    newest = max(folder.glob("*.json"))
    newest.unlink()  # a kill before it was written
    DeadLetters(folder, 3, 10_000).put(letter(3), refusal(3))
    assert details(folder) == ["detail 0", "detail 1", "detail 3"]
    assert not newest.with_suffix(".body").exists()


def test_a_full_disk_is_harmless_and_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = DeadLetters(folder, 3, 10_000)
    letters.put(letter(0), refusal(0))
    write = Path.write_bytes
    full: list[str] = [".json.new"]

    def write_or_fail(path: Path, data: bytes) -> int:
        if path.name.endswith(tuple(full)):
            write(path, bytes(data)[:3])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_or_fail)
    with caplog.at_level(logging.WARNING):
        for where in (".json.new", ".body"):
            full[0] = where
            letters.put(letter(1), refusal(1))
            assert len(list(folder.iterdir())) == 2, "an unfinished letter is removed"
    assert caplog.text.count("No space left on device") == 1
    full[0] = "nothing"
    letters.put(letter(2), refusal(2))
    assert details(folder) == ["detail 0", "detail 2"]


def test_a_file_in_place_of_the_folder_is_harmless_and_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        DeadLetters(folder, 3, 1000).put(letter(0), refusal())
    assert "rejected tasks cannot be kept" in caplog.text
    assert folder.read_text() == "a file"


def test_many_threads_write_letters_concurrently(folder: Path) -> None:
    letters = DeadLetters(folder, 50, 1_000_000)

    def write(worker: int) -> None:
        for n in range(20):
            letters.put(letter(n), refusal(100 * worker + n))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(details(folder))) == 50
    assert len(os.listdir(folder)) == 100


def test_ingest_keeps_a_letter_for_each_refusal(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, counts: Counts, folder: Path
) -> None:
    one = open_ingest()
    one._dead_letters = DeadLetters(folder, 100, 100_000)
    faulty.gate = threading.Event()
    queued = [one.submit(arrive(0), wait=False), one.submit(arrive(9, id="task-0"), wait=False)]
    faulty.gate.set()
    for future in queued:
        future.result(DEADLINE)
    one.submit(arrive(8, id="task-0"), wait=False).result(DEADLINE)
    one.submit(arrive(7, id="task-0", cursor="c"), wait=True).result(DEADLINE)
    one.submit(arrive(0), wait=False).result(DEADLINE)
    made = Rejected("unreadable", "its source could not read it")
    for bad in (letter(1, id="a/b"), letter(2), arrive(5)._replace(source="broker", rejection=made)):
        with pytest.raises(Rejected):
            one.submit(bad, wait=True)
    one.reject(letter(4), Rejected("too_large", "much"), complete=False)
    found = [(known["reason"], body.read_bytes()) for body, known in read_letters(folder)]
    assert found == [
        *(("conflict", arrive(n).body) for n in (9, 8, 7)),
        ("bad_id", b"body 1"),
        ("unreadable", b"body 2"),
        ("unreadable", arrive(5).body),
        ("too_large", b"body 4"),
    ]
    assert [reason for _, reason in counts.rejected] == [reason for reason, _ in found]
    assert json.loads(min(folder.glob("*.json")).read_text())["source"] == "http"


def test_a_pulled_source_gets_an_acknowledgement_for_each_arrival(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, make_acking: Callable[..., "AckingSource"]
) -> None:
    broken = letter(1, id="broken")
    source = make_acking([arrive(0), broken, arrive(9, id="task-0"), arrive(0), arrive(2, id="a/b"), arrive(3)])
    open_ingest().pull("p", source)
    assert source.all_acked.wait(DEADLINE)
    reasons = sorted(str(arrival.rejection and arrival.rejection.reason) for arrival in source.acked)
    assert reasons == ["None", "None", "None", "bad_id", "conflict", "unreadable"]
    assert source.durable_when_acked
    assert len(faulty) == 2


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that were synced, in order; they are really synced, too."""
    found: list[Path] = []

    def sync(path: Path) -> None:
        sync_path(path)
        found.append(path)

    monkeypatch.setattr(dead_letters, "sync_path", sync)
    return found


def find_at_risk(folder: Path, synced: list[Path]) -> set[str]:
    """Return the ids of letters that a power loss might take: those not synced, and those with names not synced."""
    done = synced[: 1 + max((at for at, path in enumerate(synced) if path == folder.parent), default=-1)]
    letters = [(known["id"], {body, body.with_suffix(".json"), folder}) for body, known in read_letters(folder)]
    return {id for id, paths in letters if not paths.issubset(done)}


def test_only_a_letter_without_another_copy_is_synced(folder: Path, synced: list[Path]) -> None:
    letters = DeadLetters(folder, 4, 100_000)
    letters.put(letter(0), refusal())
    letters.sync()
    assert synced == []
    for n in range(9):
        letters.put(letter(n), refusal(n), only_copy=True)
    assert len(letters._unsynced) == 4
    letters.sync()
    assert find_at_risk(folder, synced) == set()
    assert len(synced) == 4 * 2 + 2, "evicted letters are not synced, and each folder once"
    letters.sync()
    assert len(synced) == 10
    letters.put(letter(0), refusal(), only_copy=True)
    for n in range(4):
        letters.put(letter(n), refusal(n))
    letters.sync()
    assert synced[10:] == [folder, folder.parent], "the letter was evicted"


def test_a_concurrent_sync_waits_for_the_running_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Event(), threading.Event()

    def sync(path: Path) -> None:
        begun.set()
        assert gate.wait(DEADLINE)

    monkeypatch.setattr(dead_letters, "sync_path", sync)
    letters = DeadLetters(folder, 4, 100_000)
    letters.put(letter(0), refusal(), only_copy=True)
    threads = [threading.Thread(target=letters.sync) for _ in range(2)]
    threads[0].start()
    assert begun.wait(DEADLINE)
    letters.put(letter(1), refusal())  # writing without syncing does not wait
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    gate.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_failed_sync_of_a_letter_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dead_letters, "sync_path", fail)
    letters = DeadLetters(folder, 4, 100_000)
    letters.put(letter(0), refusal(), only_copy=True)
    with caplog.at_level(logging.WARNING):
        letters.sync()
    assert "Input/output error" in caplog.text


def test_a_letter_is_durable_before_its_ack_and_before_later_positions(
    open_ingest: Open,
    arrive: Arrive,
    faulty: Faulty,
    folder: Path,
    synced: list[Path],
    make_acking: Callable[..., "AckingSource"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = [letter(n, id=f"bad-{n}") for n in range(3)]
    source = make_acking([bad[0], arrive(0)._replace(cursor="1"), *bad[1:], arrive(9, id="task-0"), arrive(1)])
    one = open_ingest()
    one._dead_letters = DeadLetters(folder, 100, 100_000)
    faulty.gate = threading.Event()  # the first commit waits for the last arrival: the conflict is found before
    seen: list[tuple[str, set[str]]] = []
    ack, append = source.ack, faulty.append

    def record_ack(arrivals: Sequence[Arrival]) -> None:
        rejected = {arrival.id for arrival in arrivals if arrival.rejection}
        seen.append(("acknowledged", find_at_risk(folder, synced) & rejected))
        ack(arrivals)

    def record_append(records: Sequence[Record]) -> list[Receipt | Conflict]:
        seen.append(("committed", find_at_risk(folder, synced) & {"bad-0"}))
        return append(records)

    source.ack = record_ack
    monkeypatch.setattr(faulty, "append", record_append)
    one.pull("p", source)
    assert source.all_acked.wait(DEADLINE)
    assert [at for at in seen if at[1]] == []
    assert "committed" in {what for what, _ in seen}
    assert len(list(read_letters(folder))) == 4
    with pytest.raises(Rejected):
        one.submit(letter(7), wait=False)
    count = len(synced)
    one.submit(arrive(5), wait=False).result(DEADLINE)
    assert len(synced) == count, "an HTTP client still has its refused task"


class AckingSource:
    """A source of given arrivals that records each acknowledgement and whether it was durable by then."""

    def __init__(self, arrivals: list[Arrival], faulty: Faulty) -> None:
        self.arrivals, self.faulty = arrivals, faulty
        self.acked: list[Arrival] = []
        self.durable_when_acked = True
        self.all_acked = threading.Event()

    def read(self, after: str | None):
        yield from self.arrivals
        if self.faulty.gate is not None:
            self.faulty.gate.set()
        while True:
            yield None

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        self.acked += arrivals
        durable = [self.faulty.find(arrival.id) is not None for arrival in arrivals if arrival.rejection is None]
        self.durable_when_acked &= all(durable)
        if len(self.acked) == len(self.arrivals):
            self.all_acked.set()


@pytest.fixture
def make_acking(faulty: Faulty) -> Callable[..., AckingSource]:
    return lambda arrivals: AckingSource(arrivals, faulty)
