"""Files next to the history: files of a spool, and dead letters."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from streams.formats import wire
from streams.history.history import History
from streams.ingest.dead_letters import DeadLetters, read_letters
from streams.sources.files import Spool
from streams.spec import TaskSpec
from streams.types import Arrival, Conflict, Record, Rejected
from tests.crash.checks import Acknowledged, check
from tests.crash.scenarios import Acknowledge, payload_of

Processed = Literal["move", "keep"]
SPEC = TaskSpec((7,), ways=1)
FILES = 8
REFUSED = "task-8.npz"
LETTERS, LETTER_BYTES = 3, 30_000  # room for any three letters


def fill_spool(folder: Path, acknowledge: Acknowledge) -> None:
    """Put tasks and one invalid file into a spool."""
    (folder / "spool").mkdir(parents=True)
    for number in range(FILES):
        (folder / "spool" / f"task-{number}.safetensors").write_bytes(payload_of(number))
    (folder / "spool" / REFUSED).write_bytes(b"no task")


def take_files(processed: Processed, folder: Path, acknowledge: Acknowledge) -> None:
    """Store the files of the spool, two at a time, and move each away once it is durable."""
    spool = Spool(str(folder / "spool"), SPEC, "files", 0.0, 1 << 20, processed == "move")
    with History.open(folder / "history", write=True) as history:
        waiting: list[Arrival] = []
        for arrival in spool.read(None):
            waiting += [arrival] if arrival is not None else []
            if arrival is None or len(waiting) == 2:
                keep_arrivals(history, waiting, acknowledge)
                spool.ack(waiting)
                waiting = []
            if arrival is None:
                return


def keep_arrivals(history: History, arrivals: list[Arrival], acknowledge: Acknowledge) -> None:
    tasks = [one for one in arrivals if one.rejection is None]
    records = [Record(one.id, one.body, wire.digest(one.body), one.source, one.cursor, 1000.0) for one in tasks]
    for record, answer in zip(records, history.append(records), strict=True):
        assert not isinstance(answer, Conflict)
        acknowledge({"number": int(record.id.removeprefix("task-")), "round": answer.round})


def check_files(processed: Processed, folder: Path, acknowledged: Acknowledged) -> None:
    """Check that every file exists once. The next start reads all remaining files."""
    spool = folder / "spool"
    for said in acknowledged:
        assert said["number"] < FILES, "an invalid file was accepted as a task"
    find_files(spool)
    take_files(processed, folder, acknowledged.append)
    places = find_files(spool)
    moved = {"move": ({"done"}, "rejected"), "keep": ({"spool"}, "spool")}[processed]
    assert {place for name, place in places.items() if name != REFUSED} == moved[0]
    assert places[REFUSED] == moved[1]
    assert {said["number"] for said in acknowledged} == set(range(FILES))
    check(folder / "history", acknowledged)


def find_files(spool: Path) -> dict[str, str]:
    """Return the folder of each file; each file exists once, with its content unchanged."""
    found = [file for file in spool.rglob("*") if file.is_file()]
    names = sorted(file.name for file in found)
    assert names == sorted([REFUSED, *(f"task-{number}.safetensors" for number in range(FILES))]), names
    for file in found:
        number = int(file.stem.removeprefix("task-"))
        assert file.read_bytes() == (b"no task" if file.name == REFUSED else payload_of(number)), f"{file} was changed"
    return {file.name: file.parent.name for file in found}


def letter_of(number: int) -> Arrival:
    return Arrival(f"letter-{number}", payload_of(number), "http", None)


def write_letters(numbers: range, folder: Path, acknowledge: Acknowledge) -> None:
    """Write letters into a folder that holds three; acknowledge each once it can be read."""
    letters = DeadLetters(folder, LETTERS, LETTER_BYTES * LETTERS)
    for number in numbers:
        letters.put(letter_of(number), Rejected("undecodable", "it is no task"))
        if number in read_numbers(folder):
            acknowledge({"number": number})


def read_numbers(folder: Path) -> list[int]:
    """Return the numbers of the readable letters; each of them is complete."""
    numbers = []
    for body, head in read_letters(folder) if folder.exists() else ():
        numbers.append(int(head["id"].removeprefix("letter-")))
        kept = body.read_bytes()
        assert len(kept) == head["kept_bytes"], f"{body} is truncated"
        assert head["cut"] or hashlib.sha256(kept).hexdigest() == head["sha256"], f"{body} was changed"
    return numbers


def check_letters(folder: Path, acknowledged: Acknowledged) -> None:
    """Check that the newest letters are there and that the folder stays within its bounds."""
    newest = [said["number"] for said in acknowledged][1 - LETTERS :]
    found = read_numbers(folder)
    assert set(newest) <= set(found), f"letters {newest} were kept, and {found} are there"
    write_letters(range(100, 104), folder, acknowledged.append)
    assert read_numbers(folder) == [101, 102, 103]
    stems = {file.name.split(".body")[0].split(".json")[0] for file in folder.iterdir()}
    assert len(stems) == LETTERS, f"{len(stems)} letters are in a folder that holds {LETTERS}"


def make_spool_life(processed: Processed) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the play that takes files and its check."""
    return partial(take_files, processed), partial(check_files, processed)
