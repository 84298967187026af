"""A daemon shows a task on which the model fails everywhere, learns the others, and lets an operator act."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.daemon import Daemon, encode, run_cli, running_daemon, wait_for, write_sinusoid
from tests.support.poison import MARK

MODEL = ("model.build=tests.support.poison:build", 'model.args.where="backward"')


def marked() -> bytes:
    """Return a task that fits [task], and on which the model fails once gradients flow."""
    x = torch.linspace(-1, 1, 5)[:, None]
    return encode({"support_x": x, "support_y": x, "query_x": 2 * MARK * x, "query_y": x})


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    config = write_sinusoid(tmp_path_factory.mktemp("quarantine"))
    with running_daemon(config, *MODEL, 'regret.comparator=["hindsight"]') as running:
        running.submit(0)
        assert running.post(marked(), "marked").status_code == 201
        running.submit(2, 3)
        wait_for("all rounds are played", lambda: is_settled(running, 4))
        yield running


def is_settled(daemon: Daemon, ingested: int) -> bool:
    rounds = daemon.status()["rounds"]
    return bool(rounds["ingested"] == ingested and rounds["pending"] == 0)


def test_the_counts_add_up(daemon: Daemon) -> None:
    rounds = daemon.status()["rounds"]
    assert rounds["quarantined"] >= 1
    assert rounds["ingested"] == rounds["learned"] + rounds["skipped"] + rounds["quarantined"] + rounds["pending"]


def test_the_task_and_the_list_say_why(daemon: Daemon) -> None:
    task = daemon.client.get("/v1/tasks/marked").json()
    assert (task["status"], task["round"], task["loss_after"]) == ("quarantined", 1, None)
    assert (task["reason"], task["detail"]) == ("model_error", "ValueError: a marked task")
    one = daemon.client.get("/v1/quarantine").json()["rounds"][0]
    assert {**one, "timestamp": 0} == {
        "id": "marked",
        "source": "http",
        "round": 1,
        "at": 1,
        "reason": "model_error",
        "detail": "ValueError: a marked task",
        "timestamp": 0,
        "was_learned": False,
    }
    shown = run_cli("quarantine", "list", "--url", daemon.url)
    assert shown.stdout.startswith("round 1  http 'marked'\n    model_error: ValueError: a marked task\n"), shown.stderr


def test_the_metric_counts_it_by_reason(daemon: Daemon) -> None:
    lines = daemon.client.get("/metrics").text.splitlines()
    assert 'online_meta_quarantined_rounds_total{reason="process_death"} 0.0' in lines
    assert any(line.startswith('online_meta_quarantined_rounds_total{reason="model_error"} ') for line in lines)


def test_the_task_is_a_dead_letter(daemon: Daemon) -> None:
    run = daemon.status()["run"]
    letters = [json.loads(line) for line in run_cli("dead-letters", run, "--json").stdout.splitlines()]
    (letter,) = [one for one in letters if one["id"] == "marked"]
    assert (letter["reason"], letter["detail"]) == ("quarantined", "round 1, model_error: ValueError: a marked task")


def test_a_retry_is_a_new_task(daemon: Daemon) -> None:
    ingested = daemon.status()["rounds"]["ingested"]
    done = run_cli("quarantine", "retry", "1", "--url", daemon.url)
    assert done.stdout == f"round 1 is submitted again as 'marked.retry-1', round {ingested}\n", done.stderr
    wait_for("it is played", lambda: is_settled(daemon, ingested + 1))
    assert daemon.client.get("/v1/tasks/marked.retry-1").json()["status"] == "quarantined"
    wrong = run_cli("quarantine", "retry", "0", "--url", daemon.url)
    assert wrong.returncode == 78
    assert "round 0 is not in quarantine" in wrong.stderr


def test_an_operator_excludes_a_learned_round(daemon: Daemon) -> None:
    before = daemon.client.get("/v1/tasks/sin-2").json()
    done = run_cli("quarantine", "add", "2", "--reason", "a broken sensor", "--url", daemon.url)
    assert done.stdout == "round 2 is excluded from the next update on\n", done.stderr
    wait_for("the request is logged", lambda: "reason" in daemon.client.get("/v1/tasks/sin-2").json())
    after = daemon.client.get("/v1/tasks/sin-2").json()
    assert (after["status"], after["reason"], after["detail"]) == ("quarantined", "operator", "a broken sensor")
    assert after["loss_after"] == before["loss_after"] is not None
    again = run_cli("quarantine", "add", "2", "--reason", "again", "--url", daemon.url)
    assert "round 2 is in quarantine already" in again.stderr
    beyond = run_cli("quarantine", "add", "1000", "--reason", "no such round", "--url", daemon.url)
    assert "the run has" in beyond.stderr
    assert (again.returncode, beyond.returncode) == (78, 78)


def test_the_daemon_drains_with_a_report(daemon: Daemon) -> None:
    assert daemon.drain() == 0, daemon.log.read_text()
    assert "Traceback" in daemon.log.read_text(), "the exception of the model is in the log"


def test_a_task_that_ends_the_trainer_twice_is_quarantined(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path), *MODEL, 'model.args.error="exit"') as daemon:
        daemon.submit(0)
        daemon.wait_until_learned(1)
        assert daemon.post(marked(), "marked").status_code == 201
        daemon.submit(2)
        wait_for("all rounds are played", lambda: is_settled(daemon, 3))
        assert daemon.client.get("/v1/tasks/marked").json()["reason"] == "process_death"
        assert daemon.status()["trainer"]["restarts"] == 2
