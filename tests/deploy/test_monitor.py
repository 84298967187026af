"""What the daemon observes of its children, its disk and its sources; clocks are set by the tests."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy.config.config import make_config
from deploy.telemetry.facts import Facts, ProcessFacts
from deploy.telemetry.health import judge
from deploy.telemetry.monitor import ArchiveMonitor, HealthMonitor, Pace
from deploy.telemetry.process_monitor import ProcessMonitor, ProcessSample, is_running, reset_heartbeats, sample_process
from deploy.telemetry.run_view import RunView
from online_meta.regret.ledger import MAIN_LEARNER
from streams.history.errors import HistoryFull
from streams.history.history import History
from streams.history.maintenance import reach_archive
from streams.ingest.source_reader import SourceStates
from streams.types import Arrival
from tests.support.daemon import wait_for
from tests.support.ingesting import until
from trainers.journal.heartbeat import DISK, PLAYING, REPLAYING, WAITING, HeartbeatWriter
from trainers.journal.run_files import RunFiles

RAW: dict[str, Any] = {
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
    "regret": {"comparator": []},
}


@dataclass
class FakeChild:
    """A child that the test starts and ends."""

    up: bool = True
    pid: int = 1

    def alive(self) -> bool:
        return self.up


@dataclass
class FakeIngest:
    error: Exception | None = None
    source_states: SourceStates = field(default_factory=SourceStates)

    def commit_error(self) -> Exception | None:
        return self.error


class FakeDaemon:
    """A daemon whose state the test sets."""

    def __init__(self, folder: Path) -> None:
        self.config = make_config({"run": {"path": str(folder)}, **RAW}, "test")
        self.files = RunFiles(folder)
        self.history: Any = None
        self.ingest: Any = FakeIngest()
        self.view = RunView(self.files, (MAIN_LEARNER,))
        self.draining, self.started, self.tasks = False, 100.0, 0

    def pending(self) -> int:
        return self.tasks

    def learn(self, rounds: int = 1) -> None:
        """Record rounds as learned."""
        for _ in range(rounds):
            self.view.sums.append({"loss before": 2.0, MAIN_LEARNER: 1.0, "meta steps": 1})


class Scene:
    """A monitor with one child, a clock, and a heartbeat that the test writes for the child."""

    def __init__(self, folder: Path, sources: dict[str, Any] | None = None) -> None:
        self.daemon = FakeDaemon(folder)
        reset_heartbeats(self.daemon.files)
        self.now, self.busy, self.restarts = 100.0, 0.0, 0
        self.child = FakeChild()
        self.suspended = False
        self.gone: set[int] = set()
        self.pid = 0
        trainer = ProcessMonitor(
            self.daemon.files.heartbeat("trainer"),
            lambda: self.child,
            lambda: self.restarts,
            lambda pid: ProcessSample(self.suspended, self.busy),
            lambda pid: pid not in self.gone,
        )
        self.monitor = HealthMonitor(
            self.daemon, {"trainer": trainer}, sources or {}, None, lambda: self.now, lambda: self.now
        )

    def start_trainer(self, monkeypatch: pytest.MonkeyPatch) -> HeartbeatWriter:
        """Let a new process send its first heartbeat."""
        self.pid += 1
        monkeypatch.setattr(os, "getpid", lambda: 10_000 + self.pid)
        writer = HeartbeatWriter(self.daemon.files.heartbeat("trainer"), lambda: self.now, lambda: self.busy)
        monkeypatch.undo()
        return writer

    def pass_time(self, seconds: float, working: float = 0.0) -> Facts:
        """Look five times a second; the trainer uses ``working`` of a processor."""
        for _ in range(round(seconds * 5)):
            self.now, self.busy = self.now + 0.2, self.busy + 0.2 * working
            facts = self.monitor.look()
        return facts

    def bad(self) -> dict[str, str]:
        """Return the checks that are not ok now."""
        self.now += 0.2
        return {
            one.name: one.level for one in judge(self.monitor.look()) if one.level != "ok" and one.name != "answers"
        }


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_trainer_starts_ends_and_comes_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scene.pass_time(20).trainer.first_start
    assert scene.bad() == {}
    writer = scene.start_trainer(monkeypatch)
    writer.beat(WAITING, 7)
    facts = scene.pass_time(1)
    assert (facts.trainer.reported, facts.trainer.phase, facts.trainer.first) == (True, WAITING, 7)
    scene.child.up = False
    scene.gone.add(10_001)
    assert scene.bad() == {"trainer": "fail"}
    scene.child.up, scene.restarts = True, 1
    assert scene.bad() == {"trainer": "fail"}, "the new process has not reported"
    facts = scene.pass_time(3)
    assert (facts.trainer.reported, facts.trainer.seconds) == (False, pytest.approx(3.2))
    scene.start_trainer(monkeypatch)
    assert scene.bad() == {}


def test_a_stale_heartbeat_of_the_ended_process_is_no_return(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = scene.start_trainer(monkeypatch)
    scene.pass_time(1)
    writer.beat(PLAYING, 3)  # The last one, which the monitor reads after the restart.
    scene.restarts = 1
    assert scene.bad() == {"trainer": "fail"}
    assert scene.pass_time(2).trainer.reported is False


def test_a_process_that_never_comes_up_counts_as_ended_after_its_first_restart(scene: Scene) -> None:
    scene.pass_time(1)
    scene.restarts = 1
    assert scene.bad() == {"trainer": "fail"}
    scene.restarts = 2
    assert scene.bad() == {"restarts": "fail"}


def test_a_stopped_trainer_is_noticed_and_its_return_too(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = scene.start_trainer(monkeypatch)
    writer.beat(WAITING)
    scene.suspended = True
    scene.pass_time(2.6)
    assert scene.bad() == {}
    scene.pass_time(2)
    assert scene.bad() == {"trainer": "fail"}
    writer.beat(WAITING)
    assert scene.bad() == {}


def test_a_hanging_trainer_differs_from_a_long_round_by_its_processor_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = scene.start_trainer(monkeypatch)
    scene.daemon.tasks = 5
    writer.beat(PLAYING)
    scene.pass_time(50, working=0.9)
    assert scene.bad() == {}
    scene.pass_time(8)
    assert scene.bad() == {}
    scene.pass_time(5)
    assert scene.bad() == {"trainer": "fail"}


def test_a_pause_of_the_daemon_itself_is_no_silence(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.start_trainer(monkeypatch).beat(WAITING)
    scene.pass_time(0.4)
    scene.now += 3600
    facts = scene.pass_time(0.2)
    assert facts.trainer.silent_seconds < 2


def test_only_a_trainer_that_has_hung_for_long_is_killed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    monkeypatch.setattr(os, "getpid", lambda: hung.pid)
    writer = HeartbeatWriter(scene.daemon.files.heartbeat("trainer"), lambda: scene.now, lambda: scene.busy)
    monkeypatch.undo()
    writer.beat(PLAYING)
    try:
        for seconds, killed in ((115, False), (8, True)):
            facts = scene.pass_time(seconds)
            scene.monitor.kill_hung(facts, judge(facts))
            assert (hung.poll() is not None) == killed or wait_for("it is killed", lambda: hung.poll() is not None)
    finally:
        hung.kill()
        hung.wait()


def test_a_foreign_process_is_never_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    HeartbeatWriter(scene.daemon.files.heartbeat("trainer")).beat(PLAYING)
    monkeypatch.undo()
    monkeypatch.setattr(os, "kill", lambda pid, kind: pytest.fail(f"{pid} gets signal {kind}"))
    facts = scene.pass_time(200)
    assert facts.trainer.idle_seconds > 150
    scene.monitor.kill_hung(facts, judge(facts))


def test_two_ends_at_one_round_turn_restarts_until_a_new_round(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.daemon.tasks = 4
    scene.daemon.learn(3)
    writer = scene.start_trainer(monkeypatch)
    scene.pass_time(1)
    for bad in ("trainer", "restarts"):
        writer.end(IndexError("index out of range"))
        scene.restarts += 1
        scene.gone.add(10_000 + scene.pid)
        assert scene.bad() == {bad: "fail"}
        writer = scene.start_trainer(monkeypatch)
        writer.beat(REPLAYING, 0, 2)
        scene.pass_time(2)
    assert scene.bad() == {"restarts": "fail"}, "it replays, and will end again"
    scene.daemon.learn()
    assert scene.bad() == {}


def test_ends_apart_and_ends_for_a_cause_outside_do_not_count(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.daemon.learn(3)
    for cause in (ValueError("x"), OSError(errno.ENOSPC, "No space left on device")):
        writer = scene.start_trainer(monkeypatch)
        scene.pass_time(40 if cause.args[0] == "x" else 1)
        writer.end(cause)
        scene.gone.add(10_000 + scene.pid)
        scene.restarts += 1
        facts = scene.pass_time(0.4)
    assert (facts.deaths, facts.trainer.cause) == (1, DISK)
    assert scene.bad() == {"disk": "fail"}
    scene.start_trainer(monkeypatch).beat(WAITING)
    scene.pass_time(31)
    scene.start_trainer(monkeypatch).beat(WAITING)
    assert scene.bad() == {}


def test_waiting_tasks_without_rounds_are_a_stall_and_replayed_rounds_are_not(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = scene.start_trainer(monkeypatch)
    scene.daemon.tasks = 9
    for round in range(100):
        writer.beat(REPLAYING, round, 100)
        scene.pass_time(0.4)
    assert scene.bad() == {}
    for _ in range(40):
        writer.beat(WAITING, 100)
        scene.pass_time(0.8)
    assert scene.bad() == {"progress": "fail"}
    scene.daemon.learn()
    writer.beat(PLAYING, 101)
    assert scene.bad() == {}


def test_the_pace_of_the_last_minute_is_compared_with_the_usual_one() -> None:
    pace = Pace()
    for _ in range(200):
        pace.note(0.2, 1, busy=True)
    assert (pace.usual(), pace.recent()) == (None, None)
    pace.note(0.2, 0, busy=False)
    for _ in range(200):
        pace.note(0.5, 0, busy=True)
    assert pace.recent() == pytest.approx(60, abs=1)
    assert pace.usual() == pytest.approx(80 / 200, rel=0.05), "the last minute is not counted"


def test_a_commit_error_ends_with_a_write_that_succeeds(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.daemon.ingest.error = HistoryFull("the disk is full")
    assert scene.bad() == {"disk": "fail"}
    monkeypatch.setattr(scene.monitor, "_can_write", lambda: False)
    scene.pass_time(20)
    assert scene.bad() == {"disk": "fail"}
    monkeypatch.undo()
    scene.pass_time(6)
    assert scene.bad() == {}
    assert not list(scene.daemon.files.folder.glob(".probe"))
    scene.daemon.ingest.error = HistoryFull("the disk is full again")
    assert scene.bad() == {"disk": "fail"}
    scene.daemon.ingest.error = OSError(errno.EIO, "Input/output error")
    scene.pass_time(20)
    assert scene.bad() == {"disk": "fail"}, "only a commit can show that another error is over"
    scene.daemon.ingest.error = None
    assert scene.bad() == {}


class Broker:
    def read(self, after: str | None) -> Iterator[Arrival | None]:
        yield None

    def lag(self, after: str | None) -> int | None:
        return 0


def test_a_source_fails_while_its_errors_go_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {"queue": Broker(), "http": None})
    note = scene.daemon.ingest.source_states.note
    assert scene.bad() == {}
    note("queue", "read")
    scene.pass_time(1)
    note("queue", "read", "ConnectionError: refused")
    assert scene.bad() == {"source:queue": "warn"}
    scene.pass_time(6)
    assert scene.bad() == {"source:queue": "fail"}
    note("queue", "read")
    assert scene.bad() == {}
    scene.pass_time(61)
    assert scene.bad() == {"source:queue": "warn"}, "a broker answers, even that there is nothing"


def test_rollbacks_of_the_last_rounds_are_counted(scene: Scene) -> None:
    scene.daemon.learn(150)
    scene.daemon.files.rollback_log.parent.mkdir()
    scene.daemon.files.rollback_log.write_text(
        "".join(f'{{"round": {round}, "back_to": 0, "settings": "x"}}\n' for round in (20, 120, 130))
    )
    assert scene.bad() == {"divergence": "fail"}
    facts = scene.pass_time(0.2)
    assert (facts.last.rounds, facts.last.rollbacks, facts.last.loss_before) == (100, 2, 200.0)
    scene.daemon.learn(75)
    assert scene.bad() == {"divergence": "warn"}


def test_an_archive_that_does_not_answer_is_noticed() -> None:
    now, answering = [0.0], threading.Event()
    archive = ArchiveMonitor(lambda: answering.wait() and None, lambda: now[0], interval=0.001)
    now[0] = 20.0
    until(lambda: archive.state() == ("", 20.0))
    answering.set()
    until(lambda: archive.state() == ("", 0.0))
    archive.close()


def test_an_archive_that_fails_is_asked_again() -> None:
    errors: list[Exception] = [ConnectionError("refused\nby the server")]

    def reach() -> None:
        if errors:
            raise errors[0]

    archive = ArchiveMonitor(reach, interval=0.001)
    until(lambda: archive.state()[0] == "ConnectionError: refused")
    errors.clear()
    until(lambda: archive.state()[0] == "")
    archive.close()


def test_an_archive_that_is_not_in_use_is_reached(tmp_path: Path) -> None:
    with History.open(tmp_path / "history", write=True) as history:
        reach_archive(history)


def test_a_real_process_is_sampled() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        first = sample_process(process.pid)
        wait_for("it has used a processor", lambda: sample_process(process.pid).processor_seconds > 0.05)
        assert first.suspended is False
        process.send_signal(19)
        wait_for("it is stopped", lambda: sample_process(process.pid).suspended)
        assert is_running(process.pid)
    finally:
        process.kill()
        process.wait()
    assert sample_process(process.pid) is None
    assert not is_running(process.pid)


def test_a_child_that_is_not_needed_is_ok(tmp_path: Path) -> None:
    monitor = ProcessMonitor(tmp_path / "heartbeat", lambda: None, lambda: 0)
    assert monitor.look(1.0) == ProcessFacts(needed=False)
