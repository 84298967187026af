"""The comparators' process: when it refreshes, and how it handles a diverged or an unavailable comparator."""

import json
import threading
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from deploy.processes.child import hold_lock
from deploy.processes.comparators import next_target, refresh_with_rounds
from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator
from streams.history.history import History
from streams.types import Record
from tests.support.daemon import running_daemon, sinusoid, wait_for, write_sinusoid
from trainers.comparators import ComparatorUnavailable, RefreshRequest, RefreshResult, dynamic, hindsight
from trainers.journal.jsonl import LineReader, LineWriter
from trainers.journal.run_files import RunFiles
from trainers.settings import ModelSettings, RegretSettings, TrainerSettings

SETTINGS = TrainerSettings(
    ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [4]}, "mse"),
    regret=RegretSettings(every_rounds=2, comparator=("hindsight", "dynamic")),
)


@pytest.mark.parametrize(
    ("covered", "learned", "rests", "target"),
    [
        (0, 0, True, None),
        (0, 49, False, None),
        (0, 49, True, 49),
        (0, 120, False, 100),
        (100, 149, False, None),
        (100, 149, True, 149),
        (149, 151, False, 150),
        (150, 150, True, None),
    ],
)
def test_it_refreshes_every_few_rounds_and_when_idle(
    covered: int, learned: int, rests: bool, target: int | None
) -> None:
    assert next_target(covered, learned, 50, rests) == target


class StopAfter:
    """A stop signal that is set after a given number of checks."""

    def __init__(self, checks: int) -> None:
        self.checks = checks

    def is_set(self) -> bool:
        self.checks -= 1
        return self.checks < 0

    def wait(self, seconds: float) -> bool:
        return self.is_set()


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """A run of two rounds."""
    files = RunFiles(tmp_path)
    with History.open(files.history, write=True) as history:
        history.append([Record(f"t{n}", sinusoid(n), bytes(32), "s", None, 0.0) for n in range(2)])
    lines = LineWriter(files.rounds)
    for round in range(2):
        lines.append({"round": round, "skipped": None})
    lines.close()
    return files


def refresh_until_stopped(files: RunFiles, checks: int, finish: Event | None = None) -> None:
    with History.open(files.history, write=False) as history:
        refresh_with_rounds(SETTINGS, files, history, StopAfter(checks), finish=finish)  # type: ignore[arg-type]


def test_a_nonfinite_comparator_is_not_written_and_starts_again(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh(setup: LearnerContext, regret: RegretSettings, asked: RefreshRequest, *_: object) -> RefreshResult:
        setup.buffer.prefetch("hindsight", [0])
        assert "read-ahead" in [thread.name for thread in threading.enumerate()]
        return RefreshResult(Comparator("hindsight", asked.rounds, float("nan"), 0.0), {})

    monkeypatch.setattr(hindsight, "refresh", refresh)
    files.comparator("hindsight").write_bytes(b"astray")
    refresh_until_stopped(files, 2000)
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()], "its read-ahead thread is closed too"
    assert [line["kind"] for line in LineReader(files.comparators).refresh()] == ["dynamic"], "the other is refreshed"
    assert not files.comparator("hindsight").exists()


def test_an_unavailable_comparator_is_skipped_and_the_others_continue(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked_for: list[int] = []

    def refresh(setup: LearnerContext, regret: RegretSettings, asked: RefreshRequest, *_: object) -> RefreshResult:
        asked_for.append(asked.rounds)
        raise ComparatorUnavailable("there is no answer")

    monkeypatch.setattr(dynamic, "refresh", refresh)
    refresh_until_stopped(files, 2000)
    assert asked_for == [2]
    assert "dynamic is no longer refreshed: there is no answer" in caplog.text
    (line,) = LineReader(files.comparators).refresh()
    assert (line["kind"], line["as_of_round"], line["standard_error"]) == ("hindsight", 2, 0.0)
    assert {"settled", "timestamp"} < line.keys()
    refresh_until_stopped(files, 2000)
    assert asked_for == [2, 2], "the next process tries again"
    assert len(LineReader(files.comparators).refresh()) == 1, "a finished comparator is not computed again"


def test_the_newest_round_is_judged_without_training_at_the_end_of_a_run(files: RunFiles) -> None:
    """It is so once the trainer has ended; the next process refreshes as if nothing had been judged."""
    refresh_until_stopped(files, 2000)
    saved = files.comparator("hindsight").read_bytes()
    with History.open(files.history, write=True) as history:
        history.append([Record(f"t{n}", sinusoid(n), bytes(32), "s", None, 0.0) for n in (2, 3)])
    finish = Event()
    finish.set()
    with hold_lock(files.own / "trainer.lock"):
        last = threading.Thread(target=refresh_until_stopped, args=(files, 0, finish))
        last.start()
        with closing(LineWriter(files.rounds)) as lines:
            for round in (2, 3):
                lines.append({"round": round, "skipped": None})
    last.join()
    *before, line = LineReader(files.comparators).refresh()
    assert {one["as_of_round"] for one in before} == {2}
    assert (line["kind"], line["as_of_round"], line["evaluated"], line["extended"]) == ("hindsight", 4, 4, True)
    assert line["cumulative_loss"] > max(one["cumulative_loss"] for one in before if one["kind"] == "hindsight")
    assert files.comparator("hindsight").read_bytes() == saved
    refresh_until_stopped(files, 2000)
    again = LineReader(files.comparators).refresh()[len(before) + 1 :]
    assert {(one["kind"], one["as_of_round"]) for one in again} == {("hindsight", 4), ("dynamic", 4)}
    assert not any("extended" in one for one in again)


def test_the_summary_of_a_drained_run_compares_up_to_its_newest_round(tmp_path: Path) -> None:
    overrides = ("regret.every_rounds=1000", "regret.baselines=[]", "inner.answer_steps=[]")
    with running_daemon(write_sinusoid(tmp_path), *overrides) as daemon:
        heartbeat = RunFiles(tmp_path / "run").heartbeat("comparators")
        wait_for("the comparators have started", lambda: heartbeat.exists() and heartbeat.stat().st_size > 0)
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        assert daemon.drain() == 0, daemon.log.read_text()
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["regret"]["hindsight"]["as_of_round"] == 3
    assert report["regret"]["hindsight"]["lower_bound"]
