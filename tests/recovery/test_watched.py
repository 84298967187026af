"""A slow rank and a killed rank of two are identified by metrics and log lines, with their rounds."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.recovery.test_ranks import ENGINE, feed, settle
from tests.support.daemon import RestartedDaemon, wait_for
from tests.support.listeners import Listener, list_listeners

STOP_SECONDS = 1.5
"""How long a rank is stopped, so that the other rank gets to the point where it waits."""
COUNTED_SECONDS = 1000.0
"""How far the clock of rank statistics advances while a rank is stopped."""
TASKS = 18
Samples = dict[tuple[str, str | None], float]


def samples(served: RestartedDaemon) -> Samples:
    """Return the values of our metrics, by name without the prefix, and rank."""
    text = httpx.get(f"{served.url}/metrics", timeout=10).text
    return {
        (sample.name.removeprefix("online_meta_"), sample.labels.get("rank")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_for_reports(served: RestartedDaemon, rounds: int) -> Samples:
    """Return the metrics once every rank has reported ``rounds`` rounds since the last start."""

    def is_reported() -> bool:
        return [rank["steps"] for rank in trainer(served)["ranks"]] == [rounds, rounds]

    wait_for(f"the ranks reported {rounds} rounds", is_reported)
    return samples(served)


def trainer(served: RestartedDaemon) -> dict[str, Any]:
    found: dict[str, Any] = served.status()["trainer"]
    return found


class Watched(NamedTuple):
    """Metrics at the start, after calm rounds, after rounds with a slow rank, while a rank is dead, and at the end.

    ``listeners`` are those of all processes of the daemon at ``port``, before and after the ranks restart.
    """

    start: Samples
    calm: Samples
    slow: Samples
    dead: Samples
    after: Samples
    status: dict[str, Any]
    lines: list[dict[str, Any]]
    listeners: set[Listener]
    port: int


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    clock = folder / "clock"
    clock.write_text("0")
    model = ("model.build=tests.support.talkative:mlp", f'model.args.clock="{clock}"')
    overrides = ("run.logs=json", *model, "checkpoint.every_rounds=100")
    served = RestartedDaemon(folder, more=ENGINE, overrides=overrides)
    try:
        yield watch(served, clock)
    finally:
        served.process.kill()
        served.process.wait()


def watch(served: RestartedDaemon, clock: Path) -> Watched:
    feed(served, 0, 2)
    settle(served, 2)
    start = wait_for_reports(served, 2)
    feed(served, 2, 6)
    settle(served, 6)
    calm = wait_for_reports(served, 6)
    listeners = list_listeners(served.process.pid)
    slow_one = wait_for("there is a rank", lambda: served.rank(1))
    os.kill(slow_one, signal.SIGSTOP)
    feed(served, 6, 10)
    time.sleep(STOP_SECONDS)
    (clock.parent / "later").write_text(str(COUNTED_SECONDS))
    (clock.parent / "later").replace(clock)
    os.kill(slow_one, signal.SIGCONT)
    settle(served, 10)
    slow = wait_for_reports(served, 10)
    os.kill(slow_one, signal.SIGKILL)
    wait_for("the dead rank is noticed", lambda: trainer(served)["world_size"] == 0)
    dead = samples(served)
    feed(served, 10, TASKS)
    settle(served, TASKS)
    wait_for("both ranks play", lambda: trainer(served)["world_size"] == 2)
    after = wait_for_reports(served, TASKS)  # There was no checkpoint, so all rounds are played again.
    status = trainer(served)
    listeners |= list_listeners(served.process.pid)
    assert served.drain() == 0
    lines = [json.loads(line) for line in (served.folder / "daemon.log").read_text().splitlines()]
    return Watched(start, calm, slow, dead, after, status, lines, listeners, served.port)


def increase(before: Samples, after: Samples, name: str, rank: int) -> float:
    return after[name, str(rank)] - before[name, str(rank)]


@pytest.mark.timeout(400)
def test_the_other_rank_waits_for_a_slow_rank_without_working_longer(watched: Watched) -> None:
    waited = [
        increase(*pair, "rank_waiting_seconds_total", 0)
        for pair in ((watched.start, watched.calm), (watched.calm, watched.slow))
    ]
    assert waited == [0, pytest.approx(COUNTED_SECONDS, abs=1)], "the whole time, except the pause of an idle rank"
    assert increase(watched.calm, watched.slow, "rank_step_seconds_total", 0) == 0
    assert increase(watched.calm, watched.slow, "rank_steps_total", 0) == 4


@pytest.mark.timeout(400)
def test_a_killed_rank_restarts_all_ranks_once(watched: Watched) -> None:
    restarts, world = ("restarts_total", None), ("world_size", None)
    assert [seen[restarts] for seen in (watched.start, watched.slow, watched.after)] == [0, 0, 1]
    assert [seen[world] for seen in (watched.start, watched.dead, watched.after)] == [2, 0, 2]
    assert (watched.status["alive"], watched.status["restarts"], watched.status["world_size"]) == (True, 1, 2)
    for rank in range(2):
        assert watched.after["rank_steps_total", str(rank)] == 10 + TASKS, "a counter continues when ranks restart"


@pytest.mark.timeout(400)
def test_two_ranks_listen_on_loopback_and_for_one_another_only(watched: Watched) -> None:
    ranks = watched.listeners - {Listener("online_meta", "tcp", "127.0.0.1", watched.port)}
    assert {(one.process, one.address) for one in ranks} == {("deploy.processes.trainer", "127.0.0.1")}


def of_rank(watched: Watched, rank: int) -> list[dict[str, Any]]:
    return [line for line in watched.lines if line.get("rank") == rank]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_line_of_a_rank_names_it_and_its_round(watched: Watched, rank: int) -> None:
    pids = list(dict.fromkeys(line["pid"] for line in of_rank(watched, rank)))
    assert len(pids) == 2, "the rank was started twice"
    for pid, rounds in zip(pids, (10, TASKS), strict=True):
        lines = [line for line in of_rank(watched, rank) if line["pid"] == pid]
        played = [line["round"] for line in lines if line["logger"] == "talkative" and line["round"] is not None]
        assert sorted(played) == played
        assert set(played) == set(range(rounds))
        begins = [line for line in lines if line["message"].startswith("the trainer continues")]
        assert [(line["message"], line["round"]) for line in begins] == [("the trainer continues at round 0", 0)]
        assert any("the model warns" in line["message"] and line["logger"] == "py.warnings" for line in lines)
    assert (lines[-1]["message"], lines[-1]["round"]) == (f"the trainer drained after {TASKS} rounds", TASKS)


@pytest.mark.timeout(400)
def test_output_that_is_not_a_log_line_becomes_one(watched: Watched) -> None:
    wrapped = {line["message"] for line in watched.lines if line["logger"] == "deploy.trainer"}
    assert {"the model prints", "a native library writes"} <= wrapped


@pytest.mark.timeout(400)
def test_every_process_writes_json(watched: Watched) -> None:
    """All lines were parsed as JSON when they were read."""
    assert {line["process"] for line in watched.lines} >= {"daemon", "trainer", "agent"}
    died = [line for line in watched.lines if line["process"] == "agent" and "exitcode: -9" in line["message"]]
    assert len(died) == 1
    (uncaught,) = [line for line in of_rank(watched, 0) if line["level"] == "CRITICAL"]
    assert "Traceback" in uncaught["exception"]
