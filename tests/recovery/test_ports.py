"""Nothing listens but the daemon and what several ranks need. ``pytest -s`` prints what listens in each mode."""

import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.recovery.test_ranks import feed, settle
from tests.support.daemon import RestartedDaemon, free_port, wait_for
from tests.support.listeners import Listener, list_listeners, list_listeners_inside
from tests.support.nodes import LOOPBACK, Node, can_create_namespaces, lay_cable

SAMPLE_SECONDS = 0.3
SEALING = "\n[history.sealing]\nsegment_rounds = 3\n"
ENGINE = """
[engine]
kind = "deepspeed"
processes = {processes}
batching = "loop"
timeout_seconds = 20.0
"""
MACHINES = """nodes = [1, 2]
rendezvous = "{address}:{port}"
trusted_network = true
"""
TASKS = 8


class Watch:
    """Everything that a daemon and its descendants listen at, from its start until ``stop``, also for a short time."""

    def __init__(self, served: RestartedDaemon) -> None:
        self.found: set[Listener] = set()
        self._pid, self._stop = served.process.pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.found |= list_listeners(self._pid)

    def stop(self, mode: str) -> set[Listener]:
        """Return what was found; print it, too."""
        self._stop.set()
        self._thread.join()
        report(mode, self.found)
        return self.found


def report(mode: str, found: set[Listener]) -> None:
    for one in sorted(found):
        print(f"{mode}: {one.protocol} {one.address}:{one.port} {one.process}")


def places(found: set[Listener]) -> set[tuple[str, str]]:
    return {(one.process, one.address) for one in found}


def play(
    folder: Path, engine: str, mode: str, *overrides: str, kill: bool = False
) -> tuple[RestartedDaemon, set[Listener]]:
    """Run a daemon in which every process works; return what listened."""
    served = RestartedDaemon(folder, more=SEALING + engine, overrides=("regret.every_rounds=4", *overrides))
    watch = Watch(served)
    try:
        feed(served, 0, TASKS // 2)
        settle(served, TASKS // 2)
        if kill:
            os.kill(wait_for("there is a rank", lambda: served.rank(1)), signal.SIGKILL)
        feed(served, TASKS // 2, TASKS)
        settle(served, TASKS)
        for name in ("comparators", "maintenance"):
            assert served.children(name), f"the {name} run"
        found = watch.stop(mode)
        assert served.drain() == 0
    finally:
        served.process.kill()
        served.process.wait()
    return served, found


@pytest.mark.timeout(400)
def test_a_run_without_ranks_listens_at_its_own_addresses_only(tmp_path: Path) -> None:
    probes = free_port()
    served, found = play(tmp_path, "", "local", f"serve.probes=127.0.0.1:{probes}")
    assert found == {Listener("online_meta", "tcp", "127.0.0.1", port) for port in (served.port, probes)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_on_one_machine_listen_on_loopback_for_one_another_only(tmp_path: Path, processes: int) -> None:
    """The sockets of the trainers are those of gloo, which pass tensors; no store and no rendezvous listens."""
    served, found = play(tmp_path, ENGINE.format(processes=processes), f"{processes} ranks", kill=processes > 1)
    daemon = Listener("online_meta", "tcp", "127.0.0.1", served.port)
    assert daemon in found
    assert places(found - {daemon}) == {("deploy.processes.trainer", "127.0.0.1")}
    assert processes == 1 or not (served.run / "rendezvous").stat().st_mode & 0o077


@pytest.mark.timeout(400)
def test_several_machines_listen_at_the_addresses_that_join_them_only(tmp_path: Path) -> None:
    port = free_port()
    with lay_cable() if can_create_namespaces() else nullcontext(LOOPBACK) as link:
        engine = ENGINE.format(processes=1) + MACHINES.format(address=link.here, port=port)
        served = RestartedDaemon(tmp_path / "daemon", more=engine)
        watch, node = Watch(served), None
        try:
            feed(served, 0, 2)
            settle(served, 2)
            config = served.config.read_text().replace(str(served.run), str(tmp_path / "node" / "run"))
            node = Node(tmp_path / "node", config, link)
            wait_for("the node joins", lambda: node.joined() == 1)
            feed(served, 2, 4)
            settle(served, 4)
            there = list_listeners_inside(link.inside, node.process.pid)
            report("the second machine", there)
            found = watch.stop("the first machine")
            assert served.drain() == 0
            assert node.process.wait(60) == 0
        finally:
            for process in (served.process, *([node.process] if node else [])):
                process.kill()
                process.wait()
    known = {
        Listener("online_meta", "tcp", "127.0.0.1", served.port),
        Listener("deploy.processes.ranks", "tcp", link.here, port),
    }
    assert known <= found
    assert places(found - known) == {("deploy.processes.trainer", link.here)}
    assert places(there) == {("deploy.processes.join", link.there)}
