"""Killed at any system call, or told by any that it failed, ingest loses and doubles nothing that it acknowledged.

`make crash` walks all points; here each slice takes its share of those of each scenario, evenly.
"""

import random
from pathlib import Path

import pytest

from streams import history as module
from streams.history import History
from tests.crash.checks import check
from tests.crash.lives import SCENARIOS
from tests.crash.scenarios import ingest
from tests.crash.walker import Point, Walker, count_calls, points_of, walk

SLICES = 4
POINTS = {"ingest": 424, "seal": 72, "retain": 24}
"""How many of each scenario; together more than 500."""


@pytest.mark.parametrize("slice", range(SLICES))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_acknowledged_is_lost_or_doubled(walker: Walker, scenario: str, slice: int) -> None:
    points = list(points_of(walker, scenario))
    random.Random(scenario).shuffle(points)  # The same points in each run, up to what threads do.
    mine = points[: POINTS[scenario]][slice::SLICES]
    assert len(mine) == POINTS[scenario] // SLICES
    found = [walk(walker, point) for point in mine]
    assert sum(one["harmed"] for one in found) > len(mine) // 4, "most points meet a process that cannot go on"


def test_points_are_there_of_every_kind(walker: Walker) -> None:
    counts = count_calls(walker, "seal")
    assert min(counts[call] for call in ("pwrite64", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir")) > 0
    assert sum(counts.values()) > 300


def test_an_unharmed_life_acknowledges_all(walker: Walker) -> None:
    for scenario in SCENARIOS:
        folder, status = walker.live(scenario)
        assert status == 0
        acknowledged = Path(f"{folder}.acknowledged").read_text().splitlines()
        assert len(acknowledged) >= 11


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
    with History.open(tmp_path, write=True) as history, history.writing() as writer:
        writer.execute("UPDATE payloads SET payload = (SELECT payload FROM payloads WHERE round = 1) WHERE round = 2")
    with pytest.raises(module.HistoryDamaged, match="round 2 is not what was written"):
        check(tmp_path, told)
