"""A task on which the model fails on one rank alone is quarantined on all ranks, and no rank ends or hangs."""

import httpx
import pytest

from streams.producers import submit
from tests.deploy.test_quarantine import marked
from tests.recovery.test_ranks import ENGINE, feed
from tests.support.daemon import RestartedDaemon, wait_for

TASKS = 16


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_on_one_rank_quarantines_the_round_on_all(tmp_path, where, stage):
    model = ("model.build=tests.support.poison:build", f'model.args.where="{where}"', 'model.args.only_rank="1"')
    served = RestartedDaemon(tmp_path, more=ENGINE, overrides=(*model, f"engine.zero_stage={stage}"))
    try:
        feed(served, 0, 5)
        assert submit(served.url, "marked", marked()).round == 5
        feed(served, 6, TASKS)
        wait_for("all rounds are played", lambda: is_settled(served))
        (found,) = httpx.get(f"{served.url}/v1/quarantine").json()["rounds"]
        assert (found["round"], found["detail"]) == (5, "ValueError: a marked task")
        status = served.status()
        assert status["trainer"]["restarts"] == 0
        assert status["rounds"]["learned"] + status["rounds"]["quarantined"] == TASKS
        assert served.drain() == 0
    finally:
        served.process.kill()
        served.process.wait()


def is_settled(served: RestartedDaemon) -> bool:
    rounds = served.status()["rounds"]
    listed = httpx.get(f"{served.url}/v1/quarantine").json()["rounds"]
    return rounds["ingested"] == TASKS and rounds["pending"] == 0 and bool(listed)
