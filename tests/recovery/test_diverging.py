"""A served run that diverges stops with exit code 70 if it is set to stop, and rolls back and continues if not."""

import json

import pytest

from streams.history.history import History
from streams.producers import submit
from tests.recovery.test_kills import body
from tests.support.daemon import RestartedDaemon, wait_for

FALLING = ("meta.lr=1e6", "meta.optimizer=sgd", "meta.max_skipped=3", "meta.clip_norm=1e9")
RANKS = '\n[engine]\nkind = "deepspeed"\nprocesses = 2\nbatching = "loop"\n'


@pytest.fixture
def serve(tmp_path):
    """Yield a function that starts a daemon; every daemon is killed at the end."""
    started = []

    def start(*overrides, more=""):
        started.append(RestartedDaemon(tmp_path, more=more, overrides=(*FALLING, *overrides)))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()


@pytest.mark.parametrize("more", ["", RANKS], ids=["alone", "2 ranks"])
def test_a_stopping_run_exits_with_70_and_loses_nothing_acknowledged(tmp_path, serve, more):
    served = serve("meta.when_diverged=stop", more=more)
    for number in range(4):
        assert submit(served.url, f"t{number}", body(number)).round == number
    assert served.process.wait(60) == 70
    log = (tmp_path / "daemon.log").read_text()
    assert "meta-steps in a row" in log
    assert "drained, because the trainer cannot continue" in log
    with History.open(served.run / "history", write=False) as history:
        assert [history.find(f"t{number}") for number in range(4)] == [0, 1, 2, 3]
    assert json.loads((served.run / "report.json").read_text())["rounds"] == 4


def test_a_diverged_run_rolls_back_and_continues(tmp_path, serve):
    served = serve()
    for number in range(40):
        submit(served.url, f"t{number}", body(number))
    wait_for("all are played", lambda: served.status()["rounds"]["pending"] == 0)
    assert "the leader is rolled back to its state" in (tmp_path / "daemon.log").read_text()
    assert served.drain() == 0
