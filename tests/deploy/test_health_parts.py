"""Real faults of the parts around a daemon, as its monitor sees them: brokers, archives, a diverging trainer."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.telemetry.health import judge
from deploy.telemetry.monitor import ArchiveMonitor, HealthMonitor
from streams.history.history import History
from streams.history.maintenance import reach_archive
from streams.history.sealing import SealingSettings, seal_next
from streams.ingest.ingest import Ingest
from streams.ingest.source_reader import LagMonitor
from streams.spec import Limits
from tests.deploy.test_monitor import FakeDaemon
from tests.support.brokers import SPEC, Broker
from tests.support.daemon import wait_for
from tests.support.runs import SETTINGS, changed, fill, play, task


def levels(monitor: HealthMonitor, *prefixes: str) -> dict[str, str]:
    """Return the levels of the checks that are not ok, of those that begin with ``prefixes``."""
    return {one.name: one.level for one in judge(monitor.look()) if one.level != "ok" and one.name.startswith(prefixes)}


def time_until(what: str, holds: Callable[[], bool]) -> float:
    """Wait until something holds; return the seconds it took."""
    began = time.monotonic()
    wait_for(what, holds)
    return time.monotonic() - began


@pytest.mark.parametrize("kind", ["redis", "kafka", "nats"])
def test_a_real_broker_that_is_gone_turns_the_check_of_its_source(tmp_path: Path, kind: str) -> None:
    broker = Broker(kind, tmp_path / "broker")
    try:
        broker.make_stream("tasks")
        with History.open(tmp_path / "history", write=True) as history:
            ingest = Ingest(history, SPEC, Limits(), lambda: 0, lambda *_: None, lambda *_: None)
            source = broker.source("tasks")
            daemon = FakeDaemon(tmp_path / "run")
            daemon.files.folder.mkdir()
            daemon.ingest = ingest
            monitor = HealthMonitor(daemon, {}, {"queue": source}, None)
            note = ingest.source_states.note
            polling = LagMonitor(
                {"queue": source},
                history.cursor,
                lambda *_: None,
                on_polled=lambda name, error: note(name, "lag", error),
            )
            ingest.pull("queue", source)

            def unwell() -> dict[str, str]:
                time.sleep(0.1)
                return levels(monitor, "source")

            wait_for("it answers", lambda: ingest.source_states.states().get("queue") and not unwell())
            broker.network.cut()
            turned = time_until("the check fails", lambda: unwell() == {"source:queue": "fail"})
            broker.network.heal()
            back = time_until("the check is ok", lambda: unwell() == {})
            print(f"| {kind} gone | source:queue | fail | {turned:.1f} s | {back:.1f} s |")
            polling.close()
            ingest.close()
    finally:
        broker.close()


def test_a_folder_of_the_archive_that_is_gone_turns_the_check(tmp_path: Path) -> None:
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(seed) for seed in range(5)])
        assert seal_next(history, SealingSettings(segment_rounds=5)) is not None
        folder, away = tmp_path / "history/archive", tmp_path / "history/away"
        archive = ArchiveMonitor(lambda: reach_archive(history), interval=0.05)
        daemon = FakeDaemon(tmp_path / "run")
        daemon.files.folder.mkdir()
        monitor = HealthMonitor(daemon, {}, {}, archive)
        assert levels(monitor, "archive") == {}
        folder.rename(away)
        wait_for("the check turns", lambda: levels(monitor, "archive") == {"archive": "warn"})
        away.rename(folder)
        wait_for("the check turns back", lambda: levels(monitor, "archive") == {})
        archive.close()


def test_a_run_that_diverges_turns_the_check_and_good_rounds_turn_it_back(tmp_path: Path) -> None:
    diverging = changed(SETTINGS, meta={"lr": 1e30, "optimizer": "sgd", "max_skipped": 2, "clip_norm": 1e30})
    daemon = FakeDaemon(tmp_path)
    monitor = HealthMonitor(daemon, {}, {}, None)
    with History.open(daemon.files.history, write=True) as history:
        fill(history, [task(seed) for seed in range(20)])
        play(tmp_path, history, 20, diverging)
        daemon.view.refresh()
        assert levels(monitor, "divergence", "adaptation") == {"divergence": "fail"}
    daemon.learn(110)
    assert levels(monitor, "divergence", "adaptation") == {}
