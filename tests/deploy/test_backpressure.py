"""While the trainer is stopped, tasks are accepted until the backlog is full."""

import fcntl
import json
from collections.abc import Iterator

import pytest

from tests.support.daemon import Daemon, decode, encode, running_daemon, sinusoid, write_sinusoid

BACKLOG = 4


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, list[str]]]:
    """A daemon with room for a few tasks, and its answers from before its trainer had published anything."""
    config = write_sinusoid(tmp_path_factory.mktemp("narrow"), f"limits = {{ backlog = {BACKLOG} }}\n")
    run = config.parent / "run"
    run.mkdir()
    with open(run / "trainer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the trainer waits for its predecessor to end
        with running_daemon(config, "regret.comparator=[]", "regret.baselines=[]") as daemon:
            early = [ask(daemon) for ask in (_weights, _adapt, _regret, _empty_status)]
            fcntl.flock(lock, fcntl.LOCK_UN)
            daemon.submit(0)
            daemon.wait_until_learned(1)
            yield daemon, early
            assert daemon.drain() == 0
            assert "Traceback" not in daemon.log.read_text()


def _weights(daemon: Daemon) -> str:
    answer = daemon.client.get("/v1/weights")
    return f"{answer.status_code} {answer.headers['Retry-After']} {answer.json()['reason']}"


def _adapt(daemon: Daemon) -> str:
    task = decode(sinusoid(0))
    body = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
    answer = daemon.client.post("/v1/adapt", content=body)
    return f"{answer.status_code} {answer.headers['Retry-After']} {answer.json()['reason']}"


def _regret(daemon: Daemon) -> str:
    found = daemon.client.get("/v1/regret").json()
    return json.dumps([found["from"], found["to"], found["rounds"], found["comparators"], found["regret"]])


def _empty_status(daemon: Daemon) -> str:
    status = daemon.status()
    return json.dumps([status["last"], status["checkpoint"], status["learners"]["ftml"], status["regret"]])


def test_before_the_first_leader(narrow: tuple[Daemon, list[str]]) -> None:
    weights, adapt, regret, status = narrow[1]
    assert weights == adapt == "503 1 not_ready"
    assert json.loads(regret) == [0, 0, [], [], {}]
    last, checkpoint, learner, regrets = json.loads(status)
    assert (last, checkpoint, regrets) == (None, None, {})
    assert {**learner, "cumulative_loss": 0.0, "rounds": 0, "mean_loss_last_100": None} == learner


def test_a_full_backlog_is_reported_until_it_drains(narrow: tuple[Daemon, list[str]]) -> None:
    daemon = narrow[0]
    before = daemon.status()["rounds"]["ingested"]
    with daemon.paused("trainer"):
        kept = [daemon.post(sinusoid(t), f"kept-{t}") for t in range(BACKLOG)]
        assert [answer.status_code for answer in kept] == [201] * BACKLOG
        late = daemon.post(sinusoid(9), "late")
        assert (late.status_code, late.json()["reason"]) == (429, "backlog_full")
        assert int(late.headers["Retry-After"]) >= 1
        assert "too many rounds wait" in late.json()["detail"]
        assert daemon.post(sinusoid(0), "kept-0").status_code == 200, "a duplicate needs no room"
        assert daemon.status()["rounds"]["pending"] == BACKLOG
        assert daemon.status()["rounds"]["oldest_pending_age_seconds"] > 0
        assert f"online_meta_rounds_pending {BACKLOG}.0" in daemon.client.get("/metrics").text
    daemon.wait_until_learned(before + BACKLOG)
    assert daemon.post(sinusoid(9), "late").status_code == 201
    status = daemon.wait_until_learned(before + BACKLOG + 1)
    assert status["rounds"]["ingested"] == before + BACKLOG + 1
    assert status["trainer"]["restarts"] == 0
