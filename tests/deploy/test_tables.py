"""What the commands print of a run with a pool and some 20 answers."""

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from deploy.commands.demo import live_table, status_line
from deploy.commands.status import status_table
from deploy.reports.report import summary_table
from tests.support.dashboard_stand_in import MANY, Daemon

SHOWN = ["pool", "FTML", "FTML with 10 steps", "pooled ridge"]
"""Those that have weight, and those that the verdict is about."""
DAEMON = Daemon(rounds=305, learners=MANY, pool="pool")


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    rounds = DAEMON.status()["rounds"] | {"quarantined": 0}
    trainer = {"alive": True, "doing": "waiting", "restarts": 0, "world_size": 1, "ranks": []}
    found = DAEMON.status()
    return found | {"rounds": rounds, "trainer": trainer, "gaps": {}, "last": found["last"] | {"skipped": None}}


def text_of(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=600)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_status_shows_the_verdict_and_the_answers_that_matter(status: dict[str, Any]) -> None:
    text = text_of(status_table(status))
    assert status["verdict"]["sentence"] in text
    assert status["verdict"]["advice"] in text
    assert [line.split(",")[0].strip("│ ") for line in text.splitlines() if ", last 100" in line] == SHOWN
    assert text.count("regret against") == len(SHOWN) - 1 + 1, "against all but the leader, and hindsight"
    assert f"{len(MANY) - len(SHOWN)} that matter less" in text


def test_status_says_what_a_source_ignores_and_why(status: dict[str, Any]) -> None:
    text = text_of(status_table({**status, "omissions": {"spool": ["b.pt: its name ends with none of .npz", "c: x"]}}))
    (line,) = (line for line in text.splitlines() if "source spool ignores" in line)
    assert "b.pt: its name ends with none of .npz" in line
    assert "ignores" not in text_of(status_table(status))


def test_the_demo_shows_the_verdict_and_the_answers_that_matter(status: dict[str, Any]) -> None:
    text = text_of(live_table(status, 2.0))
    assert status["verdict"]["sentence"] in text
    assert [line.split(",")[0].strip() for line in text.splitlines() if ", last 100" in line] == SHOWN
    line = status_line(status, 2.0, 10)
    assert line.count("+") + line.count("-") < 12
    assert "regret against hindsight" in line
    assert "aruba" not in line


def test_the_summary_names_the_pool_first_and_the_verdict(status: dict[str, Any]) -> None:
    keys = ("learners", "regret", "verdict", "leader", "leaks")
    report = {key: status[key] for key in keys} | {"rounds": 305, "skipped": 0}
    lines = text_of(summary_table(report)).splitlines()
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows[:3] == ["pool", "FTML", "FTML with 0 steps"]
    assert len(rows) == len(MANY) + 1, "and hindsight"
    assert status["verdict"]["sentence"] in lines
    assert status["verdict"]["advice"] in lines
    assert sum(line.startswith("FTML against") for line in lines) == len(SHOWN) - 1
