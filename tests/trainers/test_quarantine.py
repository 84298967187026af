"""A task on which the model fails is quarantined: once and for all, whatever is killed, and nothing else changes."""

import json
import shutil
from threading import Event

import pytest

from online_meta.batching.compile import CompileError
from online_meta.batching.failures import is_task_failure
from online_meta.types import Batch, Task
from streams.history.history import History
from tests.support.poison import ERRORS, MARK
from tests.support.runs import SETTINGS, bits, changed, fill, kill, lines, play, task
from trainers.journal.quarantine import QUARANTINED, Quarantine, QuarantineReader, TooManyQuarantined
from trainers.journal.run_files import RunFiles
from trainers.loop.recovery import RepeatFailed
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run

ROUNDS = 12


def poisoned(where="forward", error="ValueError", switch=None, **sections):
    """Return settings whose model fails on marked tasks, if ``switch`` is given only while that file exists."""
    arguments = {**SETTINGS.model.args, "where": where, "error": error, "switch": switch and str(switch)}
    return changed(SETTINGS, model={"build": "tests.support.poison:build", "args": arguments}, **sections)


def marked(t):
    """Return a task that is marked in its query set."""
    support, query = task(t)
    return Task(support, Batch(query.x.clone().index_fill_(0, query.y[:1] * 0, 2 * MARK), query.y))


def make_history(folder, poison=(), rounds=ROUNDS):
    history = History.open(folder, write=True)
    fill(history, [marked(t) if t in poison else task(t) for t in range(rounds)])
    return history


@pytest.fixture
def make(tmp_path):
    opened = []

    def make_one(*poison, rounds=ROUNDS):
        opened.append(make_history(tmp_path / f"history-{len(opened)}", poison, rounds))
        return opened[-1]

    yield make_one
    for history in opened:
        history.close()


def read_quarantines(folder):
    reader = QuarantineReader(RunFiles(folder).quarantine_log)
    reader.refresh()
    return reader.by_round


def skipped_rounds(folder):
    return [line["round"] for line in lines(folder) if line["skipped"] == QUARANTINED]


GROUPED = {"meta": {"max_rounds_per_update": 4}}
ONLINE = {
    "regret": {"baselines": ("moml", "from_scratch"), "options": {"moml": {"steps": 1}, "from_scratch": {"steps": 1}}}
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("sections", [{}, GROUPED, GROUPED | ONLINE], ids=["single", "grouped", "grouped online"])
def test_a_task_on_which_the_model_fails_is_quarantined_and_the_others_are_learned(tmp_path, make, where, sections):
    history, folder = make(0, 5, 6), tmp_path / "run"
    play(folder, history, ROUNDS, poisoned(where, **sections))
    assert skipped_rounds(folder) == [0, 5, 6]
    found = read_quarantines(folder)
    assert [found[t].reason for t in (0, 5, 6)] == ["model_error"] * 3
    assert found[5].detail == "ValueError: a marked task"
    assert [line["round"] for line in lines(folder)] == list(range(ROUNDS))
    assert all(line["loss_after"] is not None for line in lines(folder) if line["round"] not in (0, 5, 6))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_restarts_and_replays_give_the_same_bits(tmp_path, make, where):
    history, settings = make(4, 5, 9), poisoned(where, **GROUPED)
    right = play(tmp_path / "whole", history, ROUNDS, settings)
    for updates in range(1, 7):
        kill(tmp_path / "killed", history, updates, settings)
    assert play(tmp_path / "killed", history, ROUNDS, settings) == right
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    replayed, played = RunFiles(tmp_path / "replayed"), RunFiles(tmp_path / "whole")
    replayed.history.mkdir(parents=True)
    for name in ("update_log", "execution_plan_log", "quarantine_log"):
        shutil.copy(getattr(played, name), getattr(replayed, name))
    assert play(replayed.folder, history, ROUNDS, settings) == right


def test_what_is_left_is_learned_as_if_the_round_did_not_exist(tmp_path, make):
    """An online learner that revisits nothing has the state of one whose stream never had the task."""
    with_poison, without = make(3), History.open(tmp_path / "without", write=True)
    fill(without, [task(t) for t in range(ROUNDS) if t != 3])
    settings = poisoned(regret={"baselines": ("moml",), "options": {"moml": {"steps": 2}}})
    right = play(tmp_path / "other", without, ROUNDS - 1, settings)["moml"]
    assert play(tmp_path / "run", with_poison, ROUNDS, settings)["moml"] == right
    without.close()


def test_a_quarantined_round_is_not_revisited(tmp_path, make):
    history, folder = make(2), tmp_path / "run"
    run = open_run(poisoned(), RunFiles(folder), history)
    play_rounds(run, Event(), ROUNDS)
    assert list(run.buffer.available(ROUNDS)) == [t for t in range(ROUNDS) if t != 2]
    assert list(run.buffer.available(2)) == [0, 1]
    close_run(run)


def test_a_past_round_that_fails_is_not_revisited_from_then_on(tmp_path, make):
    history, folder, switch = make(1), tmp_path / "run", tmp_path / "fails"
    settings = poisoned(switch=switch, checkpoint={"every_rounds": 5})
    play(folder, history, 6, settings)
    before = lines(folder)
    switch.touch()
    play(folder, history, ROUNDS, settings)
    (found,) = read_quarantines(folder).values()
    assert (found.round, found.reason, found.was_learned) == (1, "model_error", True)
    assert found.at >= 6
    assert lines(folder)[:6] == before
    assert skipped_rounds(folder) == []


def test_a_round_that_was_learned_and_now_fails_in_the_repetition_stops_the_start(tmp_path, make):
    history, folder, switch = make(4), tmp_path / "run", tmp_path / "fails"
    settings = poisoned(switch=switch, checkpoint={"every_rounds": 100})
    play(folder, history, 8, settings)
    shutil.rmtree(RunFiles(folder).checkpoints)
    switch.touch()
    with pytest.raises(RepeatFailed, match="round 4, which it learned before: ValueError: a marked task"):
        play(folder, history, ROUNDS, settings)
    assert read_quarantines(folder) == {}


@pytest.mark.parametrize("error", ["MemoryError", "OSError"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_faults_of_the_machine_quarantine_nothing(tmp_path, make, error, where):
    history, folder, switch = make(3), tmp_path / "run", tmp_path / "fails"
    switch.touch()
    with pytest.raises(ERRORS[error]):
        play(folder, history, ROUNDS, poisoned(where, error, switch))
    assert read_quarantines(folder) == {}
    switch.unlink()
    play(folder, history, ROUNDS, poisoned(where, error, switch))
    assert skipped_rounds(folder) == []


def test_faults_of_the_machine_are_told_from_those_of_tasks():
    assert is_task_failure(IndexError("index out of range in self"))
    assert is_task_failure(RuntimeError("Expected 4D input"))
    for error in (
        MemoryError(),
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: device-side assert triggered"),
        CompileError("the compiler failed"),
        KeyboardInterrupt(),
    ):
        assert not is_task_failure(error), error


def test_a_run_with_too_many_quarantined_rounds_stops_and_can_be_continued(tmp_path, make):
    history, folder = make(*range(3, 15), rounds=20), tmp_path / "run"
    with pytest.raises(TooManyQuarantined, match=r"11 of the last 100 rounds .* round 13"):
        play(folder, history, 20, poisoned())
    assert len(skipped_rounds(folder)) == 10
    with pytest.raises(TooManyQuarantined, match="12 of the last 100"):
        play(folder, history, 20, poisoned())
    play(folder, history, 20, poisoned())
    assert skipped_rounds(folder) == list(range(3, 15))


class Death(BaseException):
    """Stands for the end of a process in the middle of an update."""


def die_in(monkeypatch, folder, history, settings, round, loses_lines=False):
    """Open the run as the trainer process does, and end it in the middle of the update that contains ``round``.

    A kill may lose the lines that wait to be committed.
    """
    run = open_run(settings, RunFiles(folder), history, count_deaths=True)
    learn = run.learners["ftml"].learn

    def learn_or_die(*tasks):
        if round in range(run.round, run.round + len(tasks)):
            raise Death
        return learn(*tasks)

    monkeypatch.setattr(run.learners["ftml"], "learn", learn_or_die)
    try:
        play_rounds(run, Event(), ROUNDS)
    except Death:
        if loses_lines:
            assert [line["round"] for line in run.journal.pending_lines] == [3]
            run.journal.pending_lines.clear()
        return True
    finally:
        close_run(run)
    return False


def test_a_death_counts_for_its_own_round_although_the_lines_before_are_lost(tmp_path, make, monkeypatch, unhurried):
    history, folder = make(), tmp_path / "run"
    settings = changed(poisoned(), checkpoint={"every_rounds": 3})
    deaths = [die_in(monkeypatch, folder, history, settings, 4, loses_lines=True) for _ in range(3)]
    assert deaths == [True, True, False]
    assert skipped_rounds(folder) == [4]


def test_two_deaths_in_the_update_of_a_round_quarantine_it(tmp_path, make, monkeypatch):
    history, folder = make(), tmp_path / "run"
    deaths = [die_in(monkeypatch, folder, history, poisoned(), 4) for _ in range(3)]
    assert deaths == [True, True, False]
    assert read_quarantines(folder)[4].reason == "process_death"
    assert skipped_rounds(folder) == [4]


def test_two_deaths_in_the_update_of_several_rounds_split_it_first(tmp_path, make, monkeypatch):
    history, folder, settings = make(), tmp_path / "run", poisoned(**GROUPED)
    deaths = [die_in(monkeypatch, folder, history, settings, 5) for _ in range(9)]
    assert deaths == [True] * 6 + [False] * 3
    assert skipped_rounds(folder) == [5]


def test_a_process_that_was_asked_to_stop_has_not_died(tmp_path, make, monkeypatch):
    history, folder = make(), tmp_path / "run"
    for _ in range(4):
        assert die_in(monkeypatch, folder, history, poisoned(), 4)
        run = open_run(poisoned(), RunFiles(folder), history)
        run.journal.quarantine_log.note_stop()
        close_run(run)
    assert read_quarantines(folder) == {}


def request(folder, round, reason="bad sensor"):
    path = RunFiles(folder).quarantine_requests
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"round": round, "reason": reason}) + "\n")


def test_an_operator_excludes_a_learned_round_from_then_on_and_a_pending_one_for_good(tmp_path, make):
    history, folder, settings = make(), tmp_path / "run", poisoned()
    play(folder, history, 6, settings)
    before = lines(folder)
    request(folder, 2)
    request(folder, 8)
    right = play(folder, history, ROUNDS, settings)
    found = read_quarantines(folder)
    assert found[2] == Quarantine(2, 6, "operator", "bad sensor", found[2].timestamp)
    assert (found[8].at, found[8].was_learned) == (6, False)
    assert lines(folder)[:6] == before
    assert skipped_rounds(folder) == [8]
    shutil.rmtree(RunFiles(folder).checkpoints)
    RunFiles(folder).rounds.unlink()
    assert play(folder, history, ROUNDS, settings) == right
    assert len(read_quarantines(folder)) == 2


def test_idle_updates_before_a_request_repeat_with_the_rounds_that_they_had(tmp_path, make):
    history, folder = make(rounds=5), tmp_path / "run"
    settings = changed(SETTINGS, meta={"idle_updates": 2}, checkpoint={"every_rounds": 1, "keep": 100})

    class AfterIdle(Event):
        """Ends the run once both idle updates after the last round are made; a request then waits."""

        def is_set(self):
            if run.round == len(history) and run.idle_updates == 2:
                self.set()
            return super().is_set()

    run = open_run(settings, RunFiles(folder), history)
    play_rounds(run, AfterIdle(), None)
    request(folder, 1)
    fill(history, [task(t) for t in range(5, 8)])
    play_rounds(run, Event(), 8)
    right = bits(run)
    close_run(run)
    assert read_quarantines(folder)[1].at == 6
    for checkpoint in RunFiles(folder).checkpoints.iterdir():
        if checkpoint.name == "LATEST" or int(checkpoint.name) > 4:
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    assert play(folder, history, 8, settings) == right


def test_a_replay_with_other_settings_tries_the_model_again_and_keeps_the_operators_exclusions(tmp_path, make):
    history, folder = make(3), tmp_path / "run"
    play(folder, history, 6, poisoned())
    request(folder, 8)
    play(folder, history, ROUNDS, poisoned())
    assert skipped_rounds(folder) == [3, 8]
    other = RunFiles(tmp_path / "other")
    other.history.mkdir(parents=True)
    shutil.copy(RunFiles(folder).quarantine_log, other.quarantine_log)
    play(other.folder, history, ROUNDS, poisoned(switch=tmp_path / "never", meta={"lr": 0.02}))
    assert skipped_rounds(other.folder) == [8]
