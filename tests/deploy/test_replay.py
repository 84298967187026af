"""Replaying the same rounds into another folder or by another daemon."""

import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.conftest import Cli
from tests.support.finished import ROUNDS, Finished, leader_hash, lines


def test_a_replay_is_bit_identical(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = ("--history", finished.run / "history")
    ended = cli("replay", finished.config, *history, "--out", tmp_path / "again", "--json")
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    report = json.loads(ended.out)
    assert leader_hash(tmp_path / "again") == leader_hash(finished.run)
    served, again = lines(finished.run / "rounds.jsonl"), lines(tmp_path / "again/rounds.jsonl")
    assert [line["learners"] for line in again] == [line["learners"] for line in served]
    served_report = json.loads((finished.run / "report.json").read_text())
    assert report["learners"] == served_report["learners"]
    assert report == json.loads((tmp_path / "again/report.json").read_text())


def test_a_replay_in_two_parts_is_the_same(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path)
    assert cli(*ask, "--rounds", "7", "--set", "regret.comparator=[]").code == 0
    assert len(lines(tmp_path / "rounds.jsonl")) == 7
    ended = cli(*ask)
    assert ended.code == 0
    assert f"{ROUNDS} rounds of the same stream" in ended.out
    assert f"report: {tmp_path}/report.html" in ended.out
    assert leader_hash(tmp_path) == leader_hash(finished.run)


def test_a_replay_by_another_algorithm(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path)
    assert cli(*ask, "--set", "meta.gradient=reptile").code == 0
    assert leader_hash(tmp_path) != leader_hash(finished.run)
    first, other = lines(finished.run / "rounds.jsonl"), lines(tmp_path / "rounds.jsonl")
    assert other[0]["learners"] == first[0]["learners"], "nothing is learned before the first score"
    assert other[-1]["loss_after"] != first[-1]["loss_after"]
    assert [line["learners"]["from_scratch"] for line in other] == [line["learners"]["from_scratch"] for line in first]
    ended = cli(*ask, "--set", "meta.gradient=first_order")
    assert ended.code == 78
    assert "meta.gradient was 'reptile' and is 'first_order'" in ended.err


def test_a_replay_uses_the_requested_comparators(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    """For a line fitted to a sine, algebra gives the best fixed line; the other comparators approach it from above."""
    linear = ("--set", "model.args.hidden=[]", "--set", 'regret.comparator=["hindsight", "closed_form", "dynamic"]')
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path, *linear)
    assert cli(*ask).code == 0
    ended = cli(*ask, "--json")
    regret = json.loads(ended.out)["regret"]
    assert regret["closed_form"]["kind"] == "closed_form"
    assert {against: one["as_of_round"] for against, one in regret.items()} == dict.fromkeys(regret, ROUNDS)
    assert regret["hindsight"]["value"] <= regret["closed_form"]["value"] < regret["dynamic"]["value"]
    assert len(lines(tmp_path / "comparators.jsonl")) == 3, "no comparator is computed twice"
    page = (tmp_path / "report.html").read_text()
    for words in ("The comparator is exact: the best fixed", "at least as much as each task&#39;s own best"):
        assert words in page


def test_a_replay_of_too_many_rounds(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ended = cli("replay", finished.config, "--rounds", ROUNDS + 1, "--out", tmp_path)
    assert ended.code == 75
    assert f"has {ROUNDS} rounds, but {ROUNDS + 1} were requested" in ended.err
    ended = cli("replay", finished.config, "--history", tmp_path / "none", "--out", tmp_path)
    assert (ended.code, "there is no history here" in ended.err) == (78, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("meta.lr=0.5", "meta.lr was 0.001 and is 0.5"),
        ("meta.gradient=reptile", "meta.gradient was 'exact' and is 'reptile'"),
        ("run.seed=9", "seed was 0 and is 9"),
        ("regret.baselines=[]", "regret.baselines was ['from_scratch'] and is []"),
        ("model.args.hidden=[9]", "model.args was"),
    ],
)
def test_serve_refuses_a_run_with_other_settings(
    cli: Cli, finished: Finished, tmp_path: Path, override: str, message: str
) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.suffix != ".lock"}
    assert {"rounds.jsonl", "settings.json", "report.json"} <= {path.name for path in before}
    for _ in range(2):  # the second pass is without a checkpoint
        ended = cli("serve", finished.config, "--set", f"run.path={run}", "--set", override)
        assert ended.code == 78
        assert message in ended.err
        assert "give the new run another run.path" in ended.err
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert {path: path.read_bytes() for path in before} == before


def test_serve_refuses_a_run_with_other_tasks(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    wider = ("task.x_shape=[2]", "model.args.inputs=2", f"run.path={run}")
    for command in ("serve", "check"):
        ended = cli(command, finished.config, *(part for one in wider for part in ("--set", one)))
        assert ended.code == 78
        assert f"[task] x_shape = (2,), but the tasks in {run}/history have (1,): restore the old value" in ended.err


def test_serve_refuses_damaged_checkpoints(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    ended = cli("serve", finished.config, "--set", f"run.path={run}")
    assert ended.code == 78
    assert f"{run}/checkpoints/{ROUNDS}/manifest.json is damaged" in ended.err
