"""The maintenance process seals and subsamples while ingest runs. It may die at any moment; it ends with the daemon."""

from pathlib import Path

import psutil
import pytest

from streams.history.history import History
from streams.history.verify import verify
from tests.deploy.test_archive import SEALING, count_sealed_only
from tests.support.daemon import Daemon, running_daemon, sinusoid, wait_for, write_sinusoid

ALONE = ("regret.comparator=[]", "regret.baselines=[]")


def find_maintenance(daemon: Daemon) -> list[psutil.Process]:
    found = psutil.Process(daemon.process.pid).children()
    return [child for child in found if "deploy.processes.maintenance" in child.cmdline()]


@pytest.mark.timeout(240)
def test_a_killed_maintenance_process_loses_nothing_and_is_restarted(tmp_path: Path) -> None:
    config, history = write_sinusoid(tmp_path, SEALING), tmp_path / "run/history"
    with running_daemon(config, *ALONE) as daemon, daemon.paused("trainer"):
        daemon.submit(*range(4))
        assert not find_maintenance(daemon), "four rounds do not fill a segment"
        killed = set()
        for first in (4, 20):
            daemon.submit(*range(first, first + 8))
            child = daemon.child("maintenance")
            child.kill()
            killed.add(child.pid)
            assert {answer.status_code for answer in daemon.submit(*range(first + 8, first + 16))} == {201}
        wait_for("all full segments are sealed", lambda: count_sealed_only(history) == 35)
        last = daemon.child("maintenance")
        assert last.pid not in killed
        assert last.nice() > daemon.child("trainer").nice()
    log = daemon.log.read_text()
    assert daemon.process.returncode == 0, log
    assert not last.is_running(), "the process ends with the daemon"
    assert "maintenance process ended" not in log, log
    with History.open(history, write=True) as kept:
        assert kept.payloads(range(36)) == [sinusoid(n) for n in range(36)]
    assert verify(history).clean
