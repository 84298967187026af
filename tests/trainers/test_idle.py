"""While no task arrives, learners revisit past rounds as logged: a restart and a replay give the same bits."""

import shutil
import time
from threading import Event

import pytest
from safetensors import safe_open

from tests.support.runs import SETTINGS, bits, changed, fill, opened, play, task
from trainers.journal.jsonl import LineReader
from trainers.journal.plans import UpdatePlan, read_plans
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import play_rounds

BUDGET = 3
IDLE = changed(
    SETTINGS,
    meta={"idle_updates": BUDGET, "replay": "reservoir", "replay_options": {"size": 3}},
    regret={"baselines": ("online_reptile", "from_scratch")},
)


class StopWhenIdle(Event):
    """Stop a run once it has played all rounds and made ``idle_updates`` updates since."""

    def __init__(self, run, idle_updates):
        super().__init__()
        self.run, self.idle_updates, self.rests = run, idle_updates, 0

    def is_set(self):
        return self.run.round == len(self.run.history) and self.run.idle_updates >= self.idle_updates

    def wait(self, timeout=None):
        # The run may be waiting for the checkpoint that idle updates start from.
        self.rests = self.rests + 1 if self.run.checkpoint_task.is_idle() else 0
        if self.rests < 3:
            return time.sleep(timeout)
        raise AssertionError(f"the run rests after {self.run.idle_updates} updates, {self.run.round} rounds")


def play_until_idle(folder, history, idle_updates=BUDGET, settings=IDLE):
    """Play all rounds, then ``idle_updates`` updates on past rounds; return the bits of every learner."""
    with opened(folder, history, settings) as run:
        play_rounds(run, StopWhenIdle(run, idle_updates))
        return bits(run)


def append_rounds(history, count):
    fill(history, [task(100 + len(history) + n) for n in range(count)])


@pytest.fixture
def short(history_of):
    return history_of(4)


@pytest.fixture
def history_of(tmp_path):
    from streams.history.history import History

    opened_ones = []

    def make(rounds):
        history = History.open(tmp_path / f"history-{len(opened_ones)}", write=True)
        opened_ones.append(history)
        append_rounds(history, rounds)
        return history

    yield make
    for one in opened_ones:
        one.close()


def lines(folder):
    return LineReader(RunFiles(folder).rounds).refresh()


def test_idle_updates_are_made_up_to_the_budget(tmp_path, short):
    after_idle = play_until_idle(tmp_path / "run", short)
    plain = play(tmp_path / "plain", short, 4, changed(IDLE, meta={"idle_updates": 0}))
    assert {name for name in after_idle if after_idle[name] != plain[name]} == {"ftml", "online_reptile"}
    assert [plan for plan in read_plans(RunFiles(tmp_path / "run").update_log) if not plan.rounds] == [
        UpdatePlan(4, 0)
    ] * BUDGET
    with safe_open(RunFiles(tmp_path / "run").leader, "pt") as published:
        metadata = published.metadata()
        assert metadata.pop("inputs")
        assert metadata == {"round": "4", "learner": "ftml", "updates": str(BUDGET)}
    with (
        opened(tmp_path / "run", short, IDLE) as run,
        pytest.raises(AssertionError, match="the run rests after 3 updates"),
    ):
        play_rounds(run, StopWhenIdle(run, BUDGET + 1))


def test_a_rounds_line_lists_the_idle_steps_before_it(tmp_path, short):
    play_until_idle(tmp_path / "run", short)
    append_rounds(short, 2)
    play_until_idle(tmp_path / "run", short, 0)
    written = lines(tmp_path / "run")
    assert [len(line.get("more_steps", [])) for line in written] == [0, 0, 0, 0, BUDGET, 0]
    assert all(step["skipped"] is None and step["norm"] > 0 for step in written[4]["more_steps"])
    plain = play(tmp_path / "plain", short, 6, changed(IDLE, meta={"idle_updates": 0}))
    assert written[4]["loss_after"] != lines(tmp_path / "plain")[4]["loss_after"], (
        "the next task is scored with a leader that learned more"
    )
    assert plain


@pytest.mark.parametrize("kind", ["uniform", "reservoir", "prioritised", "coreset"])
def test_a_replay_makes_the_same_idle_updates(tmp_path, short, kind):
    settings = changed(IDLE, meta={"replay": kind, "replay_options": {}})
    for count, idle_updates in ((0, 2), (3, 1), (1, BUDGET)):
        append_rounds(short, count)
        after_idle = play_until_idle(tmp_path / "run", short, idle_updates, settings)
    for name, most in (("same", BUDGET), ("none", 0)):  # The replay follows the log, not the budget.
        files = RunFiles(tmp_path / name)
        files.update_log.parent.mkdir(parents=True)
        shutil.copy(RunFiles(tmp_path / "run").update_log, files.update_log)
        again = changed(settings, meta={"idle_updates": most}, checkpoint={"every_rounds": 2})
        assert play(tmp_path / name, short, len(short), again) == after_idle
        figures = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines(tmp_path / "run")]
        assert [
            {k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines(tmp_path / name)
        ] == figures


@pytest.mark.parametrize("made", range(BUDGET + 1))
@pytest.mark.parametrize("planned", [False, True])
def test_a_restart_changes_no_bit_of_idle_learning(tmp_path, history_of, made, planned):
    whole, broken = history_of(4), history_of(4)
    play_until_idle(tmp_path / "whole", whole)
    play_until_idle(tmp_path / "broken", broken, made)
    if planned and made < BUDGET:  # Killed after an update was logged and before it was made.
        with opened(tmp_path / "broken", broken, IDLE) as run:
            run.journal.update_log.add_idle_update(4)
    play_until_idle(tmp_path / "broken", broken)
    for history, name in ((whole, "whole"), (broken, "broken")):
        append_rounds(history, 3)
        play_until_idle(tmp_path / name, history)
    assert play_until_idle(tmp_path / "whole", whole) == play_until_idle(tmp_path / "broken", broken)
    assert read_plans(RunFiles(tmp_path / "whole").update_log) == read_plans(RunFiles(tmp_path / "broken").update_log)


def test_a_logged_idle_update_is_made_before_newly_arrived_tasks(tmp_path, history_of):
    one, two = history_of(4), history_of(4)
    play_until_idle(tmp_path / "one", one, 2)
    append_rounds(one, 1)
    play_until_idle(tmp_path / "one", one, 0)
    play_until_idle(tmp_path / "two", two, 1)
    with opened(tmp_path / "two", two, IDLE) as run:
        run.journal.update_log.add_idle_update(4)
    append_rounds(two, 1)
    assert play_until_idle(tmp_path / "two", two, 0) == play_until_idle(tmp_path / "one", one, 0)
    assert [len(line.get("more_steps", [])) for line in lines(tmp_path / "two")] == [0, 0, 0, 0, 2]


def test_no_idle_update_is_made_before_the_first_round(tmp_path, history_of):
    empty = history_of(0)
    with opened(tmp_path / "run", empty, IDLE) as run, pytest.raises(AssertionError, match="after 0 updates, 0 rounds"):
        play_rounds(run, StopWhenIdle(run, 1))
    assert read_plans(RunFiles(tmp_path / "run").update_log) == []
