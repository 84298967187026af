"""While no task arrives more is learned of past rounds, as planned: a restart and a replay come to the same bits."""

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


class Rested(Event):
    """Stops a run that has learned all rounds and made so many updates since."""

    def __init__(self, run, idle_updates):
        super().__init__()
        self.run, self.idle_updates, self.rests = run, idle_updates, 0

    def is_set(self):
        return self.run.round == len(self.run.history) and self.run.idle_updates >= self.idle_updates

    def wait(self, timeout=None):
        # It may wait for the checkpoint that it begins from.
        self.rests = self.rests + 1 if self.run.checkpoint_task.is_idle() else 0
        if self.rests < 3:
            return time.sleep(timeout)
        raise AssertionError(f"it rests after {self.run.idle_updates} updates, {self.run.round} rounds")


def live(folder, history, idle_updates=BUDGET, settings=IDLE):
    """Play what is there until it rests, after so many updates on past rounds; return the bits of every learner."""
    with opened(folder, history, settings) as run:
        play_rounds(run, Rested(run, idle_updates))
        return bits(run)


def add(history, count):
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
        add(history, rounds)
        return history

    yield make
    for one in opened_ones:
        one.close()


def lines(folder):
    return LineReader(RunFiles(folder).rounds).refresh()


def test_more_is_learned_while_nothing_arrives_up_to_the_budget(tmp_path, short):
    rested = live(tmp_path / "run", short)
    plain = play(tmp_path / "plain", short, 4, changed(IDLE, meta={"idle_updates": 0}))
    assert {name for name in rested if rested[name] != plain[name]} == {"ftml", "online_reptile"}
    assert [plan for plan in read_plans(RunFiles(tmp_path / "run").update_log) if not plan.rounds] == [
        UpdatePlan(4, 0)
    ] * BUDGET
    with safe_open(RunFiles(tmp_path / "run").leader, "pt") as published:
        assert published.metadata() == {"round": "4", "updates": str(BUDGET)}
    with opened(tmp_path / "run", short, IDLE) as run, pytest.raises(AssertionError, match="it rests after 3 updates"):
        play_rounds(run, Rested(run, BUDGET + 1))


def test_a_round_tells_what_was_learned_before_it(tmp_path, short):
    live(tmp_path / "run", short)
    add(short, 2)
    live(tmp_path / "run", short, 0)
    told = lines(tmp_path / "run")
    assert [len(line.get("more_steps", [])) for line in told] == [0, 0, 0, 0, BUDGET, 0]
    assert all(step["skipped"] is None and step["norm"] > 0 for step in told[4]["more_steps"])
    plain = play(tmp_path / "plain", short, 6, changed(IDLE, meta={"idle_updates": 0}))
    assert told[4]["loss_after"] != lines(tmp_path / "plain")[4]["loss_after"], (
        "the next task is met by a better leader"
    )
    assert plain


@pytest.mark.parametrize("kind", ["uniform", "reservoir", "prioritised", "coreset"])
def test_a_replay_does_the_same(tmp_path, short, kind):
    settings = changed(IDLE, meta={"replay": kind, "replay_options": {}})
    for count, idle_updates in ((0, 2), (3, 1), (1, BUDGET)):
        add(short, count)
        rested = live(tmp_path / "run", short, idle_updates, settings)
    for name, most in (("same", BUDGET), ("none", 0)):  # The book is obeyed whatever the budget is now.
        files = RunFiles(tmp_path / name)
        files.update_log.parent.mkdir(parents=True)
        shutil.copy(RunFiles(tmp_path / "run").update_log, files.update_log)
        again = changed(settings, meta={"idle_updates": most}, checkpoint={"every_rounds": 2})
        assert play(tmp_path / name, short, len(short), again) == rested
        figures = [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / "run")]
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / name)] == figures


@pytest.mark.parametrize("made", range(BUDGET + 1))
@pytest.mark.parametrize("planned", [False, True])
def test_a_restart_goes_on_as_if_there_had_been_none(tmp_path, history_of, made, planned):
    whole, broken = history_of(4), history_of(4)
    live(tmp_path / "whole", whole)
    live(tmp_path / "broken", broken, made)
    if planned and made < BUDGET:  # Killed when an update was written down and not yet made.
        with opened(tmp_path / "broken", broken, IDLE) as run:
            run.journal.update_log.add_idle_update(4)
    live(tmp_path / "broken", broken)
    for history, name in ((whole, "whole"), (broken, "broken")):
        add(history, 3)
        live(tmp_path / name, history)
    assert live(tmp_path / "whole", whole) == live(tmp_path / "broken", broken)
    assert read_plans(RunFiles(tmp_path / "whole").update_log) == read_plans(RunFiles(tmp_path / "broken").update_log)


def test_what_is_planned_when_tasks_arrive_is_made_first(tmp_path, history_of):
    one, two = history_of(4), history_of(4)
    live(tmp_path / "one", one, 2)
    add(one, 1)
    live(tmp_path / "one", one, 0)
    live(tmp_path / "two", two, 1)
    with opened(tmp_path / "two", two, IDLE) as run:
        run.journal.update_log.add_idle_update(4)
    add(two, 1)
    assert live(tmp_path / "two", two, 0) == live(tmp_path / "one", one, 0)
    assert [len(line.get("more_steps", [])) for line in lines(tmp_path / "two")] == [0, 0, 0, 0, 2]


def test_before_the_first_round_there_is_nothing_to_learn(tmp_path, history_of):
    empty = history_of(0)
    with opened(tmp_path / "run", empty, IDLE) as run, pytest.raises(AssertionError, match="after 0 updates, 0 rounds"):
        play_rounds(run, Rested(run, 1))
    assert read_plans(RunFiles(tmp_path / "run").update_log) == []
