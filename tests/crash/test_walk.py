"""After a kill or a failure at any system call, ingest loses and duplicates nothing that it acknowledged.

`make crash` walks all points. These tests walk some points of each scenario, and of the next start after a fault.
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
    "table-csv": [24],
    "table-jsonl": [12],
    "table-parquet": [12],
    "table-sql": [12],
}
"""The number of points per scenario, split into parts that can run in parallel."""
AFTER = {"ingest": 3, "seal": 2, "retain": 2, "rebuild": 1, "move": 1, "letters": 1, "table-csv": 1, "table-sql": 1}
"""After how many faults of each scenario the next start gets another fault, at ``SECONDS`` points each."""
SECONDS = 4


def ordered_points(walker: Walker, scenario: str) -> list[Point]:
    """Return the points in an order that is the same in every run, except where threads race."""
    return sorted(points_of(walker, scenario), key=lambda point: random.Random(str(point)).random())


def test_there_are_more_than_500_points() -> None:
    assert sum(map(sum, PARTS.values())) + SECONDS * sum(AFTER.values()) >= 500


@pytest.mark.parametrize(
    ("scenario", "part"), [(name, part) for name, sizes in PARTS.items() for part in range(len(sizes))]
)
def test_nothing_acknowledged_is_lost_or_duplicated(walker: Walker, scenario: str, part: int) -> None:
    sizes = PARTS[scenario]
    selected = ordered_points(walker, scenario)[part : sum(sizes) : len(sizes)]
    assert len(selected) == sizes[part]
    found = [walk(walker, point) for point in selected]
    assert sum(one["harmed"] for one in found) > len(selected) // 8, "too few faults stop the process"


@pytest.mark.parametrize("scenario", AFTER)
def test_a_second_fault_at_the_next_start_loses_nothing(walker: Walker, scenario: str) -> None:
    harmed = 0
    for first in ordered_points(walker, scenario)[: AFTER[scenario]]:
        points = points_of(walker, scenario, first)
        found = [walk(walker, point) for point in random.Random(str(first)).sample(points, SECONDS)]
        harmed += sum(one["harmed"] for one in found)
    assert harmed > 0


def test_every_kind_of_call_has_points(walker: Walker) -> None:
    counts = count_calls(walker, "seal")
    assert min(counts[call] for call in ("pwrite64", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir")) > 0
    assert sum(counts.values()) > 300


def test_a_life_without_faults_acknowledges_everything(walker: Walker) -> None:
    for scenario in SCENARIOS:
        folder, status = walker.live(scenario)
        assert status == 0
        acknowledged = Path(f"{folder}.acknowledged").read_text().splitlines()
        assert len(acknowledged) >= (11 if scenario in HISTORY else 6)


def test_kills_take_effect(walker: Walker) -> None:
    """A kill at the first sync leaves nothing acknowledged; at the last sync, nearly everything."""
    times = count_calls(walker, "ingest")["fdatasync"]
    assert walk(walker, Point("ingest", "fdatasync", "signal=KILL", "1"))["acknowledged"] == 0
    assert walk(walker, Point("ingest", "fdatasync", "signal=KILL", str(times)))["acknowledged"] >= 15


def test_premature_acknowledgements_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check detects a lost round and a changed one."""
    acknowledged: list[dict[str, int]] = []
    ingest(tmp_path, acknowledged.append)
    check(tmp_path, acknowledged)
    with pytest.raises(AssertionError, match="was acknowledged, and is lost"):
        check(tmp_path, [*acknowledged, {"number": 99, "round": 99}])
    with History.open(tmp_path, write=True) as history, history.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = (SELECT payload FROM payloads WHERE round = 1) WHERE round = 2")
    with pytest.raises(module.HistoryDamaged, match="round 2 is not what was written"):
        check(tmp_path, acknowledged)


def test_a_point_can_be_read_back() -> None:
    first = Point("seal", "rename", "signal=KILL", "7")
    for point in (first, first._replace(call="fsync", kind="error=ENOSPC", when="2+", first=first)):
        assert read_point(str(point)) == point
    for wrong in ("seal", "seal/a:b:1/a:b:2/a:b:3"):
        with pytest.raises(ValueError, match="is not a point"):
            read_point(wrong)


def test_a_rebuilt_ledger_is_never_incomplete(walker: Walker) -> None:
    """SQLite does not report a failed checkpoint at close; nothing may replace the ledger then."""
    last = count_calls(walker, "rebuild")["pwrite64"]
    assert walk(walker, Point("rebuild", "pwrite64", "error=EIO", str(last)))["harmed"]


def test_the_header_of_a_letter_is_removed_first(walker: Walker) -> None:
    """A half-removed letter is no longer listed: every listed letter has its body."""
    for when in range(1, count_calls(walker, "letters")["unlink"] + 1):
        walk(walker, Point("letters", "unlink", "error=EIO", str(when)))
