"""Two ranks that die, hang and are restarted lose nothing and change no bit."""

import json
import os
import signal
import time

import psutil
import pytest

from streams.history.history import History
from streams.history.verify import verify
from streams.producers import submit
from tests.recovery.test_kills import body
from tests.support.daemon import RestartedDaemon, wait_for
from tests.support.faults import FORWARD, Fault, arm, armed

ENGINE = """
[engine]
kind = "deepspeed"
processes = 2
zero_stage = 2
batching = "loop"
timeout_seconds = 8.0
"""
TASKS = 22
FAULTS_AT = (5, 11, 17)


def kill_rank(served: RestartedDaemon, number: int) -> None:
    os.kill(wait_for("there is a rank", lambda: served.rank(number)), signal.SIGKILL)


def kill_agent(served: RestartedDaemon, _: int) -> None:
    wait_for("there are ranks", lambda: served.rank(1))
    ranks = [served.rank(number) for number in range(2)]
    assert served.kill("ranks")
    wait_for("no rank survives as an orphan", lambda: not any(psutil.pid_exists(pid) for pid in ranks if pid))


def kill_daemon(served: RestartedDaemon, _: int) -> None:
    """Kill the daemon together with its agent and ranks; ``kill`` waits until they have ended."""
    wait_for("there are ranks", lambda: served.rank(1))
    assert served.kill("daemon")


FAULTS = {
    "the agent is killed": kill_agent,
    "the daemon is killed": kill_daemon,
}


@pytest.fixture
def serve(tmp_path):
    """Yield a function that starts a daemon; every daemon is killed at the end."""
    started = []

    def start() -> RestartedDaemon:
        started.append(RestartedDaemon(tmp_path, more=ENGINE))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()


def feed(served: RestartedDaemon, first: int, last: int) -> None:
    """Submit tasks; each must be acknowledged in any state of the ranks."""
    for number in range(first, last):
        assert submit(served.url, f"t{number}", body(number)).round == number


def settle(served: RestartedDaemon, tasks: int) -> None:
    wait_for("all are learned", lambda: served.status()["rounds"]["learned"] == tasks)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """Return the SHA-256 of a run without a fault."""
    served = RestartedDaemon(tmp_path_factory.mktemp("unharmed"), more=ENGINE)
    feed(served, 0, TASKS)
    settle(served, TASKS)
    assert served.drain() == 0
    return served.hash()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_run_recovers_by_itself_with_the_same_bits(tmp_path, serve, unharmed, fault):
    served = serve()
    fed = 0
    for number, at in enumerate(FAULTS_AT[: 2 if fault is kill_daemon else None]):
        feed(served, fed, at)
        time.sleep(0.3 * number)  # During a round, a checkpoint or a start.
        fault(served, number % 2)
        fed = at
        if number % 2:
            settle(served, fed)
    feed(served, fed, TASKS)
    settle(served, TASKS)
    assert served.drain() == 0
    assert served.hash() == unharmed
    assert verify(served.run / "history").clean
    with History.open(served.run / "history", write=False) as history:
        assert [history.find(f"t{number}") for number in range(TASKS)] == list(range(TASKS))
    lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(TASKS))
    assert "does not repeat" not in (tmp_path / "daemon.log").read_text()


POINTS = {
    "rank 1, in a meta-step": Fault(1, FORWARD, nth=7),
    "rank 0, in a meta-step": Fault(0, FORWARD, nth=11),
    "rank 1, before its shard of a checkpoint": Fault(1, "open", "ftml.1.safetensors"),
    "rank 0, before its shard of a checkpoint": Fault(0, "open", "train_on_everything.0.safetensors"),
    "rank 0, before the manifest": Fault(0, "open", "manifest.json"),
    "rank 0, before a checkpoint is visible": Fault(0, "os.rename", ".unfinished"),
    "rank 0, before LATEST says so": Fault(0, "open", "LATEST.new"),
    "rank 1, for good, in a meta-step": Fault(1, FORWARD, nth=5, signal=signal.SIGSTOP),
}


@pytest.mark.timeout(600)
def test_a_rank_fault_at_any_point_changes_no_bit(tmp_path):
    """Every acknowledged task is learned once, and no fault leaves a trace in the parameters."""
    build = ("model.build=tests.support.faults:faulty", f'model.args.folder="{tmp_path}"', "checkpoint.every_rounds=2")
    runs = {}
    for name, points in (("unharmed", {}), ("harmed", POINTS)):
        served = RestartedDaemon(tmp_path / name, more=ENGINE, overrides=build)
        try:
            for number, point in enumerate([None, *POINTS]):
                if point in points:
                    arm(tmp_path, points[point])
                feed(served, 4 * number, 4 * number + 4)
                settle(served, 4 * number + 4)
                assert not armed(tmp_path), f"{point} never happened"
            assert served.drain() == 0
        finally:
            served.process.kill()
            served.process.wait()
        lines = [json.loads(line) for line in (served.run / "rounds.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == list(range(4 * len(POINTS) + 4))
        assert "does not repeat" not in (tmp_path / name / "daemon.log").read_text()
        runs[name] = served.hash()
    assert runs["harmed"] == runs["unharmed"]
