"""What must hold in a history at the next start, whatever happened before."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streams.history import ledger
from streams.history.errors import RoundDiscarded
from streams.history.history import History
from streams.history.sealing import remove_orphans
from streams.history.verify import verify
from streams.types import Conflict
from tests.crash.scenarios import payload_of, record_of

Acknowledged = list[dict[str, Any]]


def check(folder: Path, acknowledged: list[dict[str, Any]]) -> None:
    """Check that the next start finds every acknowledged task exactly once, and can append."""
    if not (folder / ledger.FILE).exists():
        assert not acknowledged, "the history is gone"
    with History.open(folder, write=True) as history:
        rounds = dict(numbers_in(history))
        assert len(set(rounds.values())) == len(rounds), "a task has two rounds"
        for said in acknowledged:
            assert rounds.get(said["round"]) == said["number"], f"{said} was acknowledged, and is lost"
        for round, number in rounds.items():
            check_payload(history, round, number)
        check_cursors(history)
        assert remove_orphans(history) == []
        found = verify(folder)
        assert found.clean, str(found)
        (answer,) = history.append([record_of(1_000_000)])
        assert not isinstance(answer, Conflict)
        assert answer.round == len(rounds)
        check_payload(history, answer.round, 1_000_000)


def check_cursors(history: History) -> None:
    """Check that each source is at the cursor of its last task."""
    last = {entry.source: entry.cursor for entry in map(history.entry, range(len(history)))}
    for source, cursor in last.items():
        assert history.cursor(source) == cursor, f"{source} is at {history.cursor(source)}, its last task at {cursor}"


def numbers_in(history: History) -> Iterator[tuple[int, int]]:
    """Yield (round, number) of all rounds."""
    for round in range(len(history)):
        yield round, int(history.entry(round).id.removeprefix("task-"))


def check_payload(history: History, round: int, number: int) -> None:
    try:
        assert history.payload(round) == payload_of(number), f"round {round} is not what was written"
    except RoundDiscarded:
        assert history.query("SELECT 1 FROM decisions")
