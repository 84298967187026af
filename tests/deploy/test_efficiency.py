"""Learning efficiency, from the round records to the report, the ledger and the metrics."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.telemetry.metrics import MetricState, learning_efficiency
from deploy.telemetry.prometheus import make_instruments
from deploy.telemetry.run_view import RunView
from deploy.telemetry.series import regret_series
from tests.deploy.conftest import Cli
from tests.support.daemon import running_daemon, write_sinusoid
from tests.support.finished import ROUNDS, Finished, lines
from trainers.journal.jsonl import LineWriter
from trainers.journal.run_files import RunFiles

NAMES = ("ftml", "from_scratch")
LOSSES = {name: {"loss_before": 1.0, "loss_after": 0.5, "accuracy": 0.5} for name in NAMES}
PLAIN = {"loss_before": 1.0, "skipped": None, "learners": LOSSES, "steps": []}
SOON = {name: {"prefixes": [[1, None, 0.25], [2, 0.75, 0.5]], "points_needed": 2} for name in NAMES}
NEVER = {name: {"prefixes": [[1, 0.8, None]], "points_needed": None} for name in NAMES}
MEASURED = "(prefix_loss|points_needed|proficiency_reached_ratio){"


def test_a_run_reports_how_many_points_its_tasks_needed(cli: Cli, finished: Finished, tmp_path: Path) -> None:
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
    assert [line["learners"] for line in played] == [line["learners"] for line in before], (
        "the other figures do not change"
    )
    report = json.loads(ended.out)["learners"]
    for name in NAMES:
        measured = [line["efficiency"][name] for line in played]
        needed = [one["points_needed"] for one in measured]
        for line, one in zip(played, measured, strict=True):
            assert [points for points, _, _ in one["prefixes"]] == [1, 2, 4]
            curve = [*one["prefixes"], [5, line["learners"][name]["loss_after"], None]]
            assert one["points_needed"] == next((points for points, loss, _ in curve if loss <= 4), None)
        found = report[name]["learning_efficiency_last_100"]
        reached = [points for points in needed if points is not None]
        assert found["reached"] == pytest.approx(len(reached) / ROUNDS)
        assert found["mean_points_needed"] == (pytest.approx(sum(reached) / len(reached)) if reached else None)
        for at, points in enumerate((1, 2, 4)):
            mean = sum(one["prefixes"][at][1] for one in measured) / ROUNDS
            assert found["prefixes"][at] == {
                "points": points,
                "loss": pytest.approx(mean),
                "accuracy": None,
                "rounds": ROUNDS,
            }
        assert found["prefixes"][3] == {"points": 100, "loss": None, "accuracy": None, "rounds": 0}
    assert len({line["efficiency"]["ftml"]["points_needed"] for line in played}) > 1, "all tasks need the same"


def write_rounds(folder: Path) -> RunFiles:
    """Write four rounds: one from before the setting existed, one that reached 0.5, one that did not, one skipped."""
    files = RunFiles(folder)
    skipped = {"loss_before": None, "skipped": "not_finite", "learners": {}, "steps": []}
    append(files, PLAIN, {**PLAIN, "efficiency": SOON}, {**PLAIN, "efficiency": NEVER}, skipped)
    return files


def append(files: RunFiles, *rounds: dict[str, Any]) -> None:
    """Append round records."""
    before = len(lines(files.rounds)) if files.rounds.exists() else 0
    writer = LineWriter(files.rounds)
    for round, line in enumerate(rounds, before):
        writer.append({"round": round, **line})
    writer.close()


def test_rounds_without_a_curve_and_skipped_rounds_do_not_count(tmp_path: Path) -> None:
    files = write_rounds(tmp_path)
    view = RunView(files, NAMES, (1, 2), 0.5)
    view.refresh()
    assert view.learners()["ftml"]["learning_efficiency_last_100"] == {
        "prefixes": [
            {"points": 1, "loss": 0.8, "accuracy": None, "rounds": 1},
            {"points": 2, "loss": 0.75, "accuracy": 0.5, "rounds": 1},
        ],
        "proficiency": 0.5,
        "reached": 0.5,
        "mean_points_needed": 2.0,
        "rounds": 2,
        "rounds_reached": 1,
    }
    assert "learning_efficiency_last_100" not in RunView(files, NAMES).learners()["ftml"]


def test_the_ledger_has_one_value_per_bucket(tmp_path: Path) -> None:
    view = RunView(write_rounds(tmp_path), NAMES, (1, 2, 9), 0.5)
    view.refresh()
    found = regret_series(view, 0, None, 100)
    assert found["efficiency"] == {"prefixes": [1, 2, 9], "proficiency": 0.5}
    assert found["learners"]["from_scratch"]["efficiency"] == {
        "prefixes": [
            {"points": 1, "loss": [None, None, 0.8, None], "accuracy": [None] * 4, "rounds": [0, 0, 1, 0]},
            {
                "points": 2,
                "loss": [None, 0.75, None, None],
                "accuracy": [None, 0.5, None, None],
                "rounds": [0, 1, 0, 0],
            },
            {"points": 9, "loss": [None] * 4, "accuracy": [None] * 4, "rounds": [0] * 4},
        ],
        "rounds": [0, 1, 1, 0],
        "rounds_reached": [0, 1, 0, 0],
        "reached": [None, 1.0, 0.0, None],
        "mean_points_needed": [None, 2.0, None, None],
    }
    whole = regret_series(view, 0, None, 1)["learners"]["ftml"]["efficiency"]
    assert (whole["reached"], whole["mean_points_needed"]) == ([0.5], [2.0])
    assert regret_series(view, 9, None, 1)["learners"]["ftml"]["efficiency"]["mean_points_needed"] == []


def test_the_ledger_has_only_what_is_configured(tmp_path: Path) -> None:
    files = write_rounds(tmp_path)
    plain, curves = RunView(files, NAMES), RunView(files, NAMES, (1,))
    for view in (plain, curves):
        view.refresh()
    found = regret_series(plain, 0, None, 9)
    assert "efficiency" not in {*found, *found["learners"]["ftml"]}
    found = regret_series(curves, 0, None, 9)
    assert found["efficiency"] == {"prefixes": [1], "proficiency": None}
    assert set(found["learners"]["ftml"]["efficiency"]) == {"prefixes"}


def samples(view: RunView) -> dict[str, str]:
    """Return the exported metrics of the learning efficiency by name and labels."""
    registry = CollectorRegistry()
    learning_efficiency.update(make_instruments(registry), MetricState(view, 0, lambda: None, 0, 1))
    values = [line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    return {sample.removeprefix("online_meta_"): value for sample, value in values if re.search(MEASURED, sample)}


def test_the_metrics_cover_the_last_100_rounds(tmp_path: Path) -> None:
    files = write_rounds(tmp_path)
    view = RunView(files, NAMES, (1, 2, 9), 0.5)
    assert set(samples(view).values()) == {"NaN"}, "before the first round nothing is known"
    view.refresh()
    values = samples(view)
    assert len(values) == 10, "five for each learner"
    for name in NAMES:
        assert values[f'prefix_loss{{learner="{name}",points="1"}}'] == "0.8"
        assert values[f'prefix_loss{{learner="{name}",points="2"}}'] == "0.75"
        assert values[f'prefix_loss{{learner="{name}",points="9"}}'] == "NaN", "no support set is as long"
        assert values[f'points_needed{{learner="{name}"}}'] == "2.0"
        assert values[f'proficiency_reached_ratio{{learner="{name}"}}'] == "0.5"
    append(files, *[{**PLAIN, "efficiency": NEVER}] * 100)
    view.refresh()
    values = samples(view)
    assert values['prefix_loss{learner="ftml",points="2"}'] == "NaN"
    assert (values['points_needed{learner="ftml"}'], values['proficiency_reached_ratio{learner="ftml"}']) == (
        "NaN",
        "0.0",
    )


def test_what_is_not_configured_is_not_measured(tmp_path: Path) -> None:
    files = write_rounds(tmp_path)
    assert samples(RunView(files, NAMES)) == {}
    assert set(samples(RunView(files, NAMES, (1,)))) == {
        f'prefix_loss{{learner="{name}",points="1"}}' for name in NAMES
    }


def test_status_regret_and_metrics_agree(tmp_path: Path) -> None:
    asked = ("regret.prefixes=[1, 3]", "regret.proficiency=4", "regret.comparator=[]")
    with running_daemon(write_sinusoid(tmp_path), *asked) as daemon:
        daemon.submit(*range(6))
        daemon.wait_until_learned(6)
        status = daemon.status()["learners"]["ftml"]["learning_efficiency_last_100"]
        found = daemon.client.get("/v1/regret", params={"points": 1}).json()
        text = daemon.client.get("/metrics").text
    assert found["efficiency"] == {"prefixes": [1, 3], "proficiency": 4}
    own = found["learners"]["ftml"]["efficiency"]
    assert status["reached"] > 0, "no task reached the proficiency"
    assert own["reached"] == pytest.approx([status["reached"]])
    assert own["mean_points_needed"] == pytest.approx([status["mean_points_needed"]])
    assert f'online_meta_points_needed{{learner="ftml"}} {status["mean_points_needed"]}' in text
    assert f'online_meta_proficiency_reached_ratio{{learner="ftml"}} {status["reached"]}' in text
    for one, after in zip(status["prefixes"], own["prefixes"], strict=True):
        assert after["loss"] == pytest.approx([one["loss"]])
        assert f'online_meta_prefix_loss{{learner="ftml",points="{one["points"]}"}} {one["loss"]}' in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["regret.prefixes=[5, 2]"], "[regret] prefixes = [5, 2]: they rise, as [1, 2, 5, 10] does"),
        (["regret.proficiency=0.9"], "proficiency is looked for among prefixes: give some, such as"),
        (["regret.prefixes=[0]"], "[regret] prefixes[0] = 0: must be at least 1"),
    ],
)
def test_invalid_settings_are_refused(cli: Cli, config: Path, asked: list[str], message: str) -> None:
    ended = cli("check", config, *(word for one in asked for word in ("--set", one)))
    assert ended.code == 78
    assert message in ended.err
