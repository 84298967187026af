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


def test_a_letter_says_what_came_and_why_it_was_refused(folder: Path) -> None:
    letters = DeadLetters(folder, 10, 10_000, clock=lambda: 1_700_000_000.25)
    assert not folder.exists(), "no folder before there is something in it"
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
def test_an_id_is_data_and_never_part_of_a_name(folder: Path, id: str) -> None:
    DeadLetters(folder, 10, 10_000).put(letter(0, id=id), refusal())
    ((_, known),) = read_letters(folder)
    assert known["id"] == id[:500]
    assert sorted(path.name for path in folder.parent.parent.rglob("*") if path.is_file()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert all(set(path.name) <= set("0123456789abcdefTZ.-" + "bodyjsn") for path in folder.iterdir())


def test_a_long_body_is_cut_and_marked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "LETTER_BYTES", 8)
    letters = DeadLetters(folder, 10, 10_000)
    letters.put(letter(0, b"x" * 9), refusal())
    letters.put(letter(0, b"x" * 8), refusal())
    letters.put(letter(0, b"half"), refusal(), complete=False)
    found = [(body.read_bytes(), known["received_bytes"], known["cut"]) for body, known in read_letters(folder)]
    assert found == [(b"x" * 8, 9, True), (b"x" * 8, 8, False), (b"half", 4, True)]


def test_the_oldest_go_first_by_count_also_after_restarts_and_when_the_clock_jumps_back(folder: Path) -> None:
    clock = [2_000_000_000.0]
    for restart in range(3):
        letters = DeadLetters(folder, 4, 10_000, clock=lambda: clock[0])
        for n in range(3):
            letters.put(letter(n), refusal(3 * restart + n))
            clock[0] -= 100_000
        assert len(list(folder.iterdir())) == 2 * min(4, 3 * restart + 3)
    assert details(folder) == ["detail 5", "detail 6", "detail 7", "detail 8"]
    DeadLetters(folder, 2, 10_000)
    assert details(folder) == ["detail 7", "detail 8"], "a smaller bound holds at once"


def test_the_bound_on_bytes_always_holds(folder: Path) -> None:
    letters = DeadLetters(folder, 1000, 3_000)
    for n in range(40):
        letters.put(letter(n, bytes(50 * (n % 9))), refusal(n))
        assert size_of(folder) <= 3_000
    assert details(folder)[-1] == "detail 39"
    assert len(details(folder)) > 3
    letters.put(letter(0, bytes(5_000)), refusal(99))
    assert details(folder)[-1] == "detail 39", "one that is larger than all of the room is left out, and harms no other"
    again = DeadLetters(folder, 1000, 3_000)
    again.put(letter(0, bytes(2_000)), refusal(41))
    assert size_of(folder) <= 3_000
    assert details(folder)[-1] == "detail 41"


@pytest.mark.parametrize("bounds", [(0, 100), (100, 0)])
def test_a_bound_of_none_keeps_none(folder: Path, bounds: tuple[int, int]) -> None:
    DeadLetters(folder, *bounds).put(letter(0), refusal())
    assert not folder.exists()


def test_what_a_killed_process_left_counts_and_goes_and_what_is_no_letter_stays(folder: Path) -> None:
    letters = DeadLetters(folder, 3, 10_000)
    for n in range(3):
        letters.put(letter(n), refusal(n))
    first, second, third = sorted(folder.glob("*.json"))
    first.unlink()  # killed before it was written
    second.rename(second.with_suffix(".json.new"))  # or before it was renamed
    for name in ("notes.txt", "20231114T221320.250000Z-x-0123456789abcdef.json", ".body"):
        (folder / name).write_text("mine")
    assert details(folder) == ["detail 2"]
    letters = DeadLetters(folder, 3, 10_000)
    letters.put(letter(3), refusal(3))
    letters.put(letter(4), refusal(4))
    assert details(folder) == ["detail 2", "detail 3", "detail 4"]
    assert len(list(folder.iterdir())) == 6 + 3
    assert third.exists()


def test_what_was_left_unfinished_makes_room_before_any_letter_does(folder: Path) -> None:
    letters = DeadLetters(folder, 3, 10_000)
    for n in range(3):
        letters.put(letter(n), refusal(n))
    newest = max(folder.glob("*.json"))
    newest.unlink()  # killed before it was written
    DeadLetters(folder, 3, 10_000).put(letter(3), refusal(3))
    assert details(folder) == ["detail 0", "detail 1", "detail 3"]
    assert not newest.with_suffix(".body").exists()


def test_a_disk_that_cannot_be_written_harms_nothing_and_is_told_once(
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
            assert len(list(folder.iterdir())) == 2, "what was begun is removed"
    assert caplog.text.count("No space left on device") == 1
    full[0] = "nothing"
    letters.put(letter(2), refusal(2))
    assert details(folder) == ["detail 0", "detail 2"]


def test_a_folder_that_is_none_is_told_and_harms_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        DeadLetters(folder, 3, 1000).put(letter(0), refusal())
    assert "rejected tasks cannot be kept" in caplog.text
    assert folder.read_text() == "a file"


def test_many_threads_write_their_letters_side_by_side(folder: Path) -> None:
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


def test_ingest_keeps_a_letter_of_all_that_it_refuses(
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


def test_a_pulled_source_is_told_what_became_of_its_arrivals(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, make_settling: Callable[..., "Settling"]
) -> None:
    broken = letter(1, id="broken")
    source = make_settling([arrive(0), broken, arrive(9, id="task-0"), arrive(0), arrive(2, id="a/b"), arrive(3)])
    open_ingest().pull("p", source)
    assert source.all_settled.wait(DEADLINE)
    reasons = sorted(str(arrival.rejection and arrival.rejection.reason) for arrival in source.settled)
    assert reasons == ["None", "None", "None", "bad_id", "conflict", "unreadable"]
    assert source.durable_when_told
    assert len(faulty) == 2


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was synced, in order; it is really synced, too."""
    found: list[Path] = []

    def sync(path: Path) -> None:
        sync_path(path)
        found.append(path)

    monkeypatch.setattr(dead_letters, "sync_path", sync)
    return found


def lost(folder: Path, synced: list[Path]) -> set[str]:
    """Return the ids of letters that a power loss might take: of what was not synced, and the names after it."""
    done = synced[: 1 + max((at for at, path in enumerate(synced) if path == folder.parent), default=-1)]
    letters = [(known["id"], {body, body.with_suffix(".json"), folder}) for body, known in read_letters(folder)]
    return {id for id, paths in letters if not paths.issubset(done)}


def test_an_only_copy_is_synced_and_others_are_not(folder: Path, synced: list[Path]) -> None:
    letters = DeadLetters(folder, 4, 100_000)
    letters.put(letter(0), refusal())
    letters.sync()
    assert synced == []
    for n in range(9):
        letters.put(letter(n), refusal(n), only_copy=True)
    assert len(letters._unsynced) == 4
    letters.sync()
    assert lost(folder, synced) == set()
    assert len(synced) == 4 * 2 + 2, "what was driven out is not synced, and the folders once"
    letters.sync()
    assert len(synced) == 10
    letters.put(letter(0), refusal(), only_copy=True)
    for n in range(4):
        letters.put(letter(n), refusal(n))
    letters.sync()
    assert synced[10:] == [folder, folder.parent], "driven out by others"


def test_who_syncs_beside_another_waits_for_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    letters.put(letter(1), refusal())  # who only writes does not wait
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    gate.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_letter_that_cannot_be_synced_is_told(
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


def test_a_letter_is_durable_before_its_source_forgets_it_and_before_a_later_position_is(
    open_ingest: Open,
    arrive: Arrive,
    faulty: Faulty,
    folder: Path,
    synced: list[Path],
    make_settling: Callable[..., "Settling"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = [letter(n, id=f"bad-{n}") for n in range(3)]
    source = make_settling([bad[0], arrive(0)._replace(cursor="1"), *bad[1:], arrive(9, id="task-0"), arrive(1)])
    one = open_ingest()
    one._dead_letters = DeadLetters(folder, 100, 100_000)
    faulty.gate = threading.Event()  # the first commit is after the last arrival: the conflict is found while it waits
    seen: list[tuple[str, set[str]]] = []
    ack, append = source.ack, faulty.append

    def ack_and_look(arrivals: Sequence[Arrival]) -> None:
        seen.append(("told", lost(folder, synced) & {arrival.id for arrival in arrivals if arrival.rejection}))
        ack(arrivals)

    def append_and_look(records: Sequence[Record]) -> list[Receipt | Conflict]:
        seen.append(("committed", lost(folder, synced) & {"bad-0"}))
        return append(records)

    source.ack = ack_and_look
    monkeypatch.setattr(faulty, "append", append_and_look)
    one.pull("p", source)
    assert source.all_settled.wait(DEADLINE)
    assert [at for at in seen if at[1]] == []
    assert "committed" in {what for what, _ in seen}
    assert len(list(read_letters(folder))) == 4
    with pytest.raises(Rejected):
        one.submit(letter(7), wait=False)
    count = len(synced)
    one.submit(arrive(5), wait=False).result(DEADLINE)
    assert len(synced) == count, "an HTTP client that was refused still has its task"


class Settling:
    """A source of given arrivals that is told what became of each, and looks whether it is durable by then."""

    def __init__(self, arrivals: list[Arrival], faulty: Faulty) -> None:
        self.arrivals, self.faulty = arrivals, faulty
        self.settled: list[Arrival] = []
        self.durable_when_told = True
        self.all_settled = threading.Event()

    def read(self, after: str | None):
        yield from self.arrivals
        if self.faulty.gate is not None:
            self.faulty.gate.set()
        while True:
            yield None

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        self.settled += arrivals
        durable = [self.faulty.find(arrival.id) is not None for arrival in arrivals if arrival.rejection is None]
        self.durable_when_told &= all(durable)
        if len(self.settled) == len(self.arrivals):
            self.all_settled.set()


@pytest.fixture
def make_settling(faulty: Faulty) -> Callable[..., Settling]:
    return lambda arrivals: Settling(arrivals, faulty)
