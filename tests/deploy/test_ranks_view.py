"""How the daemon sees the group of ranks: each restart and each step is counted once, whoever restarts a rank."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import deploy.telemetry.ranks_view
from deploy.server.state import DaemonState
from deploy.telemetry.prometheus import make_instruments
from deploy.telemetry.ranks_view import RanksView
from deploy.telemetry.run_view import RunView
from online_meta.regret.ledger import MAIN_LEARNER
from streams.atomic_files import replace_file
from streams.history.history import History
from trainers.journal.run_files import RunFiles


class Supervision:
    """Returns how often the daemon has restarted its child process."""

    restarts = 0

    def __call__(self) -> int:
        return self.restarts


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@pytest.fixture
def sleeper() -> Any:
    """A process that a test can kill."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield child
    child.kill()
    child.wait()


def write_agent_file(files: RunFiles, pid: int, restarts: int) -> None:
    replace_file(files.agent, json.dumps({"pid": pid, "restarts": restarts}).encode(), durable=False)


def write_report(files: RunFiles, started: float, pids: list[int], near: list[int], *steps: int) -> None:
    ranks = [
        {"rank": i, "host": "h", "pid": pid, "steps": n, "step_seconds": n / 2, "waiting_seconds": n / 4}
        for i, (pid, n) in enumerate(zip(pids, steps, strict=True))
    ]
    report = {"started": started, "world_size": len(pids), "near": near, "ranks": ranks}
    replace_file(files.ranks, json.dumps(report).encode(), durable=False)


def test_restarts_are_counted_once_whoever_restarts_a_rank(files: RunFiles) -> None:
    supervision = Supervision()
    ranks_view = RanksView(files, supervision)
    counted = [ranks_view.refresh()[0]]
    for pid, restarts, agents in [(10, 0, 0), (10, 1, 0), (10, 3, 0), (10, 3, 1), (20, 0, 1), (20, 2, 1), (20, 2, 1)]:
        write_agent_file(files, pid, restarts)
        supervision.restarts = agents
        counted.append(ranks_view.refresh()[0])
    assert counted == [0, 0, 1, 2, 1, 0, 2, 0]
    assert ranks_view.restarts == 6


def test_files_of_an_earlier_daemon_are_not_counted(files: RunFiles) -> None:
    write_agent_file(files, 10, 5)
    write_report(files, 1.0, [1], [0], 7)
    ranks_view = RanksView(files, Supervision())
    assert ranks_view.refresh() == (0, {})
    assert (ranks_view.restarts, ranks_view.world_size(), ranks_view.ranks()) == (0, 0, [])


def test_restarted_ranks_count_from_zero(files: RunFiles) -> None:
    ranks_view = RanksView(files, Supervision())
    done = []
    for started, steps in [(1.0, (4, 4)), (1.0, (6, 6)), (1.0, (6, 6)), (2.0, (1, 1)), (2.0, (2, 2)), (3.0, (5,))]:
        write_report(files, started, [1] * len(steps), [0], *steps)
        done.append({rank: amounts["steps"] for rank, amounts in ranks_view.refresh()[1].items()})
    assert done == [{0: 4, 1: 4}, {0: 2, 1: 2}, {0: 0, 1: 0}, {0: 1, 1: 1}, {0: 1, 1: 1}, {0: 5}]
    assert ranks_view.ranks() == [{"rank": 0, "host": "h", "steps": 5, "step_seconds": 2.5, "waiting_seconds": 1.25}]


def test_a_group_is_alive_while_all_of_its_local_ranks_live(files: RunFiles, sleeper: Any) -> None:
    ranks_view = RanksView(files, Supervision())
    assert ranks_view.world_size() == 0
    elsewhere = 2**22 + 1  # no process on this machine has this id
    write_report(files, 1.0, [1, sleeper.pid, elsewhere], [0, 1], 0, 0, 0)
    ranks_view.refresh()
    assert ranks_view.world_size() == 3
    sleeper.kill()
    sleeper.wait()
    assert ranks_view.world_size() == 0


def test_a_restart_is_counted_once_with_concurrent_refreshes(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_slowly(path: Path) -> dict[str, Any]:
        time.sleep(0.05)
        return read(path)

    read = deploy.telemetry.ranks_view._read
    monkeypatch.setattr(deploy.telemetry.ranks_view, "_read", read_slowly)
    instruments = make_instruments(CollectorRegistry())
    unused: Any = None
    with History.open(files.history, write=True) as history:
        state = DaemonState(
            config=unused,
            files=files,
            history=history,
            ingest=unused,
            view=RunView(files, (MAIN_LEARNER,)),
            registry=unused,
            instruments=instruments,
            adapter=unused,
            trainer_alive=unused,
            ranks_view=RanksView(files, Supervision()),
            broken=unused,
            token=None,
        )
        write_agent_file(files, 10, 1)
        write_report(files, 1.0, [1], [0], 4)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: state.refresh(), range(8)))
    assert instruments["restarts_total"]._value.get() == 1
    assert instruments["rank_steps_total"].labels(rank=0)._value.get() == 4
