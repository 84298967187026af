"""Killed at any system call, or told by any that it failed, ingest loses and doubles nothing that it acknowledged.

`make crash` walks all points; here it is some of each scenario, and of those of the next start after a fault.
"""

import random
from pathlib import Path

import pytest

from streams.history import history as module
from streams.history.history import History
from tests.crash.checks import check
from tests.crash.lives import HISTORY, SCENARIOS
from tests.crash.scenarios import ingest
from tests.crash.walker import Point, Walker, count_calls, points_of, read_point, walk

PARTS = {
    "ingest": [82] * 4,
    "seal": [12] * 2,
    "retain": [8] * 2,
    "repair": [8],
    "rebuild": [8],
    "move": [56],
    "keep": [16],
    "letters": [28],
    "random-0-1": [24],
}
"""How many points of each scenario, in parts that run side by side."""
AFTER = {"ingest": 3, "seal": 2, "retain": 2, "rebuild": 1, "move": 1, "letters": 1}
"""After how many faults of each the next start meets another, at this many points."""
SECONDS = 4


def chosen(walker: Walker, scenario: str) -> list[Point]:
    """The same points in each run, up to what threads do."""
    return sorted(points_of(walker, scenario), key=lambda point: random.Random(str(point)).random())


def test_there_are_more_than_500_points() -> None:
    assert sum(map(sum, PARTS.values())) + SECONDS * sum(AFTER.values()) >= 500


@pytest.mark.parametrize(
    ("scenario", "part"), [(name, part) for name, sizes in PARTS.items() for part in range(len(sizes))]
)
def test_nothing_acknowledged_is_lost_or_doubled(walker: Walker, scenario: str, part: int) -> None:
    sizes = PARTS[scenario]
    mine = chosen(walker, scenario)[part : sum(sizes) : len(sizes)]
    assert len(mine) == sizes[part]
    found = [walk(walker, point) for point in mine]
    assert sum(one["harmed"] for one in found) > len(mine) // 8, "many points meet a process that cannot go on"


@pytest.mark.parametrize("scenario", AFTER)
def test_nor_is_it_by_a_fault_of_the_next_start(walker: Walker, scenario: str) -> None:
    harmed = 0
    for first in chosen(walker, scenario)[: AFTER[scenario]]:
        points = points_of(walker, scenario, first)
        found = [walk(walker, point) for point in random.Random(str(first)).sample(points, SECONDS)]
        harmed += sum(one["harmed"] for one in found)
    assert harmed > 0


def test_points_are_there_of_every_kind(walker: Walker) -> None:
    counts = count_calls(walker, "seal")
    assert min(counts[call] for call in ("pwrite64", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir")) > 0
    assert sum(counts.values()) > 300


def test_an_unharmed_life_acknowledges_all(walker: Walker) -> None:
    for scenario in SCENARIOS:
        folder, status = walker.live(scenario)
        assert status == 0
        acknowledged = Path(f"{folder}.acknowledged").read_text().splitlines()
        assert len(acknowledged) >= (11 if scenario in HISTORY else 6)


def test_a_kill_is_a_kill(walker: Walker) -> None:
    """At the first of its calls nothing was acknowledged; at the last of them nearly all."""
    times = count_calls(walker, "ingest")["fdatasync"]
    assert walk(walker, Point("ingest", "fdatasync", "signal=KILL", "1"))["acknowledged"] == 0
    assert walk(walker, Point("ingest", "fdatasync", "signal=KILL", str(times)))["acknowledged"] >= 15


def test_what_was_acknowledged_too_early_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is worth something: it finds a lost round, a doubled one and a changed one."""
    told: list[dict[str, int]] = []
    ingest(tmp_path, told.append)
    check(tmp_path, told)
    with pytest.raises(AssertionError, match="was acknowledged, and is lost"):
        check(tmp_path, [*told, {"number": 99, "round": 99}])
    with History.open(tmp_path, write=True) as history, history.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = (SELECT payload FROM payloads WHERE round = 1) WHERE round = 2")
    with pytest.raises(module.HistoryDamaged, match="round 2 is not what was written"):
        check(tmp_path, told)


def test_a_point_is_read_as_it_is_written() -> None:
    first = Point("seal", "rename", "signal=KILL", "7")
    for point in (first, first._replace(call="fsync", kind="error=ENOSPC", when="2+", first=first)):
        assert read_point(str(point)) == point
    for wrong in ("seal", "seal/a:b:1/a:b:2/a:b:3"):
        with pytest.raises(ValueError, match="is no point"):
            read_point(wrong)


def test_a_ledger_made_anew_is_never_half_of_one(walker: Walker) -> None:
    """SQLite says nothing when it cannot carry its log over at the end; nothing may take the ledger's place then."""
    last = count_calls(walker, "rebuild")["pwrite64"]
    assert walk(walker, Point("rebuild", "pwrite64", "error=EIO", str(last)))["harmed"]


def test_a_letter_loses_its_head_first(walker: Walker) -> None:
    """What is half removed is no letter any more: each that is listed has its bytes."""
    for when in range(1, count_calls(walker, "letters")["unlink"] + 1):
        walk(walker, Point("letters", "unlink", "error=EIO", str(when)))
