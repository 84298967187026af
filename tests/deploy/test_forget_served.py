"""A daemon, a replay and a restored backup after an entity was forgotten."""

import json
import shutil
from pathlib import Path

import httpx

from streams.entities import find_entity, make_entity_id
from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, running_daemon, sinusoid, wait_for, write_sinusoid
from tests.support.finished import leader_hash, lines

KEY, ROUNDS = "shop 7", 9
OWN = [3, 6]


def retry(daemon: Daemon) -> httpx.Response:
    return daemon.client.post("/v1/quarantine/3/retry", headers={"Content-Type": "application/json"})


def test_a_daemon_learns_again_without_the_entity_and_a_replay_is_of_the_new_epoch(tmp_path: Path, cli: Cli) -> None:
    config = write_sinusoid(tmp_path, 'answers = "ftml"\n')
    run = tmp_path / "run"
    with running_daemon(config) as daemon:
        for t in range(ROUNDS):
            headers = {"Idempotency-Key": make_entity_id("shops", KEY if t in OWN else "other", str(t))}
            assert daemon.client.post("/v1/tasks", content=sinusoid(t), headers=headers).status_code == 201
        daemon.wait_until_learned(ROUNDS)
        daemon.wait_until_compared(ROUNDS)
        assert cli("forget", run, KEY).code == 75
        assert daemon.drain() == 0
    backup, replayed = tmp_path / "backup", tmp_path / "replayed"
    shutil.copytree(run, backup)
    assert cli("replay", config, "--out", replayed).code == 0
    assert cli("forget", run, KEY).code == 0
    stale = cli("replay", config, "--out", replayed)
    assert stale.code == 78
    assert "a replay starts from the last erasure" in stale.err.replace("\n", " ")
    for number, restored in enumerate(("nothing", "the run", "its checkpoints")):
        if restored == "its checkpoints":
            shutil.rmtree(run / "checkpoints")
            shutil.copytree(backup / "checkpoints", run / "checkpoints")
        if restored == "the run":
            shutil.rmtree(run)
            shutil.copytree(backup, run)
            early = cli("replay", config, "--out", tmp_path / "early")
            assert early.code == 78
            assert "is from before 1 erasures" in early.err.replace("\n", " ")
        with running_daemon(config) as daemon:
            daemon.wait_until_learned(ROUNDS - len(OWN))
            wait_for("no round is pending", lambda: not daemon.status()["rounds"]["pending"])
            daemon.wait_until_compared(ROUNDS)
            assert daemon.client.get("/v1/entities/shop%207").status_code == 404
            again = daemon.client.post(
                "/v1/tasks", content=sinusoid(3), headers={"Idempotency-Key": make_entity_id("shops", KEY, "3")}
            )
            assert (again.status_code, again.json()["reason"]) == (422, "forgotten")
            quarantined = daemon.client.get("/v1/quarantine").json()["rounds"]
            assert [(one["round"], one["reason"]) for one in quarantined] == [(t, "forgotten") for t in OWN]
            assert retry(daemon).status_code == 410
            assert daemon.drain() == 0
            assert daemon.log.read_text().count("completed the erasure") == number
        assert [line["round"] for line in lines(run / "rounds.jsonl") if line["skipped"]] == OWN
        assert all(find_entity(line["id"]) != KEY for line in lines(run / "rounds.jsonl"))
        assert "shop_207" not in (run / "history" / "ledger.sqlite").read_bytes().decode("latin-1")
        out = tmp_path / f"again-{restored}"
        ended = cli("replay", config, "--out", out, "--json")
        assert json.loads(ended.out)["epoch"] == 1
        assert leader_hash(out) == leader_hash(run)
        assert leader_hash(out) == leader_hash(tmp_path / "again-nothing")
    assert "epoch 1 of the history" in cli("replay", config, "--out", out).out
