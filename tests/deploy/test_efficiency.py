"""Learning efficiency from the lines of the rounds to the report."""

import json
from pathlib import Path

import pytest

from deploy.view import RunView
from tests.deploy.conftest import Cli
from tests.deploy.finished import ROUNDS, Finished, lines
from trainers.json_lines import LineWriter
from trainers.run_files import RunFiles

NAMES = ("ftml", "from_scratch")


def test_a_run_tells_how_many_points_its_tasks_needed(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path, "--json")
    asked = (
        "--set",
        "regret.prefixes=[1, 2, 4, 100]",
        "--set",
        "regret.proficiency=4",
        "--set",
        "regret.comparator=[]",
    )
    ended = cli(*ask, *asked)
    assert ended.code == 0, ended.err
    played, before = lines(tmp_path / "rounds.jsonl"), lines(finished.run / "rounds.jsonl")
    assert [line["learners"] for line in played] == [line["learners"] for line in before], "the rest stays as it is"
    report = json.loads(ended.out)["learners"]
    for name in NAMES:
        told = [line["efficiency"][name] for line in played]
        needed = [one["points_needed"] for one in told]
        for line, one in zip(played, told, strict=True):
            assert [points for points, _, _ in one["prefixes"]] == [1, 2, 4]
            curve = [*one["prefixes"], [5, line["learners"][name]["loss_after"], None]]
            assert one["points_needed"] == next((points for points, loss, _ in curve if loss <= 4), None)
        found = report[name]["learning_efficiency_last_100"]
        reached = [points for points in needed if points is not None]
        assert found["reached"] == pytest.approx(len(reached) / ROUNDS)
        assert found["mean_points_needed"] == (pytest.approx(sum(reached) / len(reached)) if reached else None)
        for at, points in enumerate((1, 2, 4)):
            mean = sum(one["prefixes"][at][1] for one in told) / ROUNDS
            assert found["prefixes"][at] == {"points": points, "loss": pytest.approx(mean), "accuracy": None}
        assert found["prefixes"][3] == {"points": 100, "loss": None, "accuracy": None}
    assert len({line["efficiency"]["ftml"]["points_needed"] for line in played}) > 1, "a test that could fail"


def test_rounds_from_before_it_was_asked_for_and_skipped_ones_do_not_count(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    losses = {name: {"loss_before": 1.0, "loss_after": 0.5, "accuracy": 0.5} for name in NAMES}
    plain = {"loss_before": 1.0, "skipped": None, "learners": losses, "steps": []}
    told = {name: {"prefixes": [[1, None, 0.25], [2, 0.75, 0.5]], "points_needed": 2} for name in NAMES}
    never = {name: {"prefixes": [[1, 0.8, None]], "points_needed": None} for name in NAMES}
    writer = LineWriter(files.rounds)
    for round, extra in enumerate(({}, {"efficiency": told}, {"efficiency": never})):
        writer.append({"round": round, **plain, **extra})
    writer.append({"round": 3, "loss_before": None, "skipped": "not_finite", "learners": {}, "steps": []})
    writer.close()
    view = RunView(files, NAMES, (1, 2))
    view.refresh()
    assert view.learners(0.5)["ftml"]["learning_efficiency_last_100"] == {
        "prefixes": [{"points": 1, "loss": 0.8, "accuracy": None}, {"points": 2, "loss": 0.75, "accuracy": 0.5}],
        "proficiency": 0.5,
        "reached": 0.5,
        "mean_points_needed": 2.0,
    }
    assert "learning_efficiency_last_100" not in RunView(files, NAMES).learners()["ftml"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["regret.prefixes=[5, 2]"], "[regret] prefixes = [5, 2]: they rise, as [1, 2, 5, 10] does"),
        (["regret.proficiency=0.9"], "proficiency is looked for among prefixes: give some, such as"),
        (["regret.prefixes=[0]"], "[regret] prefixes[0] = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_asked_for(cli: Cli, config: Path, asked: list[str], told: str) -> None:
    ended = cli("check", config, *(word for one in asked for word in ("--set", one)))
    assert ended.code == 78
    assert told in ended.err
