"""A race between settings on two ranks: what is decided holds on both, after kills and in a replay."""

import json
import subprocess
import sys

import httpx
import pytest

from tests.recovery.test_ranks import ENGINE, feed, settle
from tests.support.daemon import RestartedDaemon

RACE = (
    "inner.lr=auto",
    "tuning.inner_lr=[0.001, 0.01, 0.05]",
    "tuning.warmup=2",
    "tuning.rounds=6",
    "engine.deterministic=true",
)
DECIDED, TASKS = 8, 14


@pytest.mark.timeout(600)
def test_ranks_and_a_replay_obey_a_race_whatever_is_killed(tmp_path):
    served = RestartedDaemon(tmp_path, more=ENGINE, overrides=RACE)
    try:
        feed(served, 0, DECIDED - 2)
        settle(served, DECIDED - 2)
        served.kill("ranks")
        feed(served, DECIDED - 2, DECIDED + 2)
        settle(served, DECIDED + 2)
        assert httpx.get(f"{served.url}/v1/status").json()["learners"].keys() >= {"ftml", "ftml.inner.lr=0.05"}
        served.kill("daemon")
        feed(served, DECIDED + 2, TASKS)
        settle(served, TASKS)
        assert served.drain() == 0
    finally:
        served.process.kill()
        served.process.wait()
    made = [json.loads(line) for line in (served.run / "history/tuning.jsonl").read_text().splitlines()]
    (decision,) = [line for line in made if line["event"] == "decision"]
    assert (decision["round"], decision["raced"]) == (DECIDED, 6)
    records = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    raced = {name for name in records[0]["learners"] if name.startswith("ftml.inner")}
    assert len(raced) == 2
    for line in records:
        assert raced & line["learners"].keys() == (raced if line["round"] < DECIDED else set())
    again = tmp_path / "again"
    command = [sys.executable, "-m", "online_meta", "replay", str(served.config), "--out", str(again)]
    sets = [word for override in RACE for word in ("--set", override)]
    other = ("--set", "tuning.rounds=3", "--set", "regret.comparator=[]")
    subprocess.run([*command, *sets, *other], check=True, capture_output=True, timeout=300)
    replayed = [json.loads(line) for line in (again / "rounds.jsonl").read_text().splitlines()]
    for before, line in zip(records, replayed, strict=True):
        assert line["learners"].keys() == before["learners"].keys()
        assert line["loss_after"] == pytest.approx(before["loss_after"], rel=1e-3)
