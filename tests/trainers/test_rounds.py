"""Playing a history: what is reported, published, checkpointed and skipped, and what a round costs."""

import inspect
import json
import math
import os
from threading import Event

import pytest
import torch
from safetensors import safe_open

import online_meta.learners
from online_meta import registry
from online_meta.answers import unpack_meta
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import score_task
from online_meta.replay._task_stacks import StackedTasks
from online_meta.testing.learner_problems import answers_numbers, frozen
from online_meta.types import Batch, Learned, Meta, PrefixScore, Score, Task
from streams.history.history import History
from streams.history.ledger import RoundEntry
from tests.support.runs import SETTINGS, changed, fill, lines, opened, play, task
from tests.trainers.conftest import ROUNDS
from trainers.checkpoint import list_checkpoints, load_latest
from trainers.journal.jsonl import LineReader
from trainers.journal.plans import read_plans
from trainers.journal.round_records import SupportSizes, make_round_records, read_content
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import play_rounds, play_update
from trainers.loop.task_prefetch import HistoryBuffer

LEARNERS = {"ftml", "train_on_everything", "from_scratch"}


def leader_of(run):
    """Return the meta-parameters that the run answers from."""
    return unpack_meta(run.answering.learner.state())


def test_every_round_has_a_complete_line(tmp_path, history):
    play(tmp_path, history, ROUNDS)
    found = LineReader(RunFiles(tmp_path).rounds).refresh()
    assert [line["round"] for line in found] == list(range(ROUNDS))
    for line in found:
        keys = "round id source loss_before loss_after accuracy replayed seconds skipped learners steps content overlap"
        assert list(line) == [*keys.split(), "seconds_by_learner"]
        assert (line["id"], line["source"], line["skipped"]) == (f"t{line['round']}", "s", None)
        assert line["replayed"] == min(line["round"] + 1, 4)
        assert line["learners"].keys() == LEARNERS
        top = {key: line[key] for key in ("loss_before", "loss_after", "accuracy")}
        assert line["learners"]["ftml"].items() >= top.items()
        for own in line["learners"].values():
            assert own["nll"] == pytest.approx(own["loss_after"], rel=1e-5), "cross-entropy is in nats"
            assert sum(own["calibration"]["samples"]) == len(history[line["round"]].query.y)
        assert all(math.isfinite(own["loss_after"]) and 0 <= own["accuracy"] <= 1 for own in line["learners"].values())
        assert [step["skipped"] for step in line["steps"]] == [None]
        assert line["steps"][0]["norm"] > 0
        assert line["seconds"] > 0
        spent = line["seconds_by_learner"]
        assert spent.keys() == LEARNERS
        assert min(spent.values()) > 0
        assert sum(spent.values()) <= line["seconds"] + 1e-5, "they are parts of the whole"


def test_a_reported_score_belongs_to_the_leader_before_the_round(tmp_path, history):
    with opened(tmp_path, history) as run:
        learner = run.learners["ftml"]
        for round in range(4):
            before = Meta({name: w.clone() for name, w in leader_of(run).weights.items()}, {})
            play_update(run, 1)
            right = score_task(learner.inner, before, history[round])
            seen = score_task(learner.inner, leader_of(run), history[round])
            line = lines(tmp_path)[round]
            assert (line["loss_before"], line["loss_after"]) == (right.loss_before, right.loss_after)
            assert line["loss_after"] != seen.loss_after


def test_the_leader_is_published_with_its_round(tmp_path, history):
    with opened(tmp_path, history) as run:
        for until in (2, 5):
            play_rounds(run, Event(), until)
            with safe_open(RunFiles(tmp_path).leader, "pt") as published:
                metadata = published.metadata()
                assert json.loads(metadata.pop("inputs")).keys() == {""}
                assert metadata == {"round": str(until), "learner": "ftml"}
                found = {name: published.get_tensor(name) for name in published.keys()}  # noqa: SIM118 - no mapping
            assert frozen(found) == frozen(leader_of(run).weights)


def test_checkpoints_are_written_at_the_interval_and_at_the_end(tmp_path, history):
    play(tmp_path, history, 8)
    files = RunFiles(tmp_path)
    log = LineReader(files.checkpoint_log).refresh()
    rounds = [line["round"] for line in log]
    assert (rounds[0], rounds[-1]) == (3, 8)  # A slow disk delays the checkpoints in between.
    assert list_checkpoints(files.checkpoints) == rounds[-2:]
    assert all(line["stall"] > 0 and line["seconds"] > 0 for line in log)
    assert load_latest(files.checkpoints).rounds == 8


def test_a_run_without_new_rounds_publishes_its_leader_and_writes_no_checkpoint(tmp_path, history):
    play(tmp_path, history, 3)
    files = RunFiles(tmp_path)
    files.leader.unlink()
    play(tmp_path, history, 3)
    assert files.leader.exists()
    assert [line["round"] for line in LineReader(files.checkpoint_log).refresh()] == [3]


class StoppingHistory(History):
    """A history that sets the stop event when round 4 is recorded."""

    stop = Event()

    def entry(self, round):
        if round == 4:
            self.stop.set()
        return super().entry(round)


def test_a_stop_during_a_round_finishes_it_and_writes_a_checkpoint(tmp_path, history):
    with StoppingHistory.open(history.path, write=False) as stopping:
        stopping.stop = Event()
        with opened(tmp_path, stopping) as run:
            assert play_rounds(run, stopping.stop) == 5
    assert len(lines(tmp_path)) == 5
    assert load_latest(RunFiles(tmp_path).checkpoints).rounds == 5


class ArrivingTasks(Event):
    """A stop event that appends a task when it is first waited on, and is set from the second time on."""

    def __init__(self, history):
        super().__init__()
        self.history, self.waits = history, 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            fill(self.history, [task(1)])
        else:
            self.set()
        return self.is_set()


def test_rounds_are_played_as_they_are_committed(tmp_path, empty):
    fill(empty, [task(0)])
    stop = ArrivingTasks(empty)
    with opened(tmp_path, empty) as run:
        assert play_rounds(run, stop) == 2
    assert stop.waits == 2
    assert [line["round"] for line in lines(tmp_path)] == [0, 1]


def poison():
    """Return a task of finite numbers that overflow in the loss."""
    good = task(50)
    return Task(good.support, Batch(good.query.x * 1e38 * 3, good.query.y))


def test_losses_that_are_not_finite_are_charged_and_harm_no_other_round(tmp_path, empty):
    fill(empty, [task(0), task(1), poison(), task(2), task(3)])
    play(tmp_path, empty, 5)
    found = lines(tmp_path)
    assert [line["skipped"] for line in found] == [None] * 5
    assert [any("charged" in own for own in line["learners"].values()) for line in found] == [
        at == 2 for at in range(5)
    ]
    failed = [own for own in found[2]["learners"].values() if own["loss_after"] is None]
    finite = [own["loss_after"] for own in found[2]["learners"].values() if own["loss_after"] is not None]
    assert failed
    assert all(own["charged"] >= max([1000.0, *finite]) for own in failed)
    for line in found:
        assert [step["skipped"] for step in line["steps"]] == [None], "every one of these steps revisits it"
        assert line["learners"].keys() == LEARNERS


def test_a_learner_that_fails_voids_no_result_of_another():
    good, bad = (
        Score(2.0, 1.0, 0.5, (PrefixScore(1, 1.5, None),)),
        Score(2.0, math.nan, 0.1, (PrefixScore(1, 3.0, None),)),
    )
    entry = RoundEntry(0, "t0", "s", b"", 0, 0.0, None)
    scores = {"ftml": [good], "other": [bad], "worst": [Score(2.0, 5000.0, None)]}
    (line,) = make_round_records([entry], scores, Learned((), ()), 1.0, SupportSizes([4]), loss_cap=10.0)
    assert line["skipped"] is None
    assert line["learners"] == {
        "ftml": {"loss_before": 2.0, "loss_after": 1.0, "accuracy": 0.5},
        "other": {"loss_before": 2.0, "loss_after": None, "accuracy": 0.1, "charged": 5000.0},
        "worst": {"loss_before": 2.0, "loss_after": 5000.0, "accuracy": None},
    }
    assert line["efficiency"]["other"]["prefixes"] == [(1, 3.0, None)]


def test_a_content_is_known_by_its_samples_and_not_by_their_order():
    one = task(0)
    order = torch.randperm(len(one.support.x), generator=torch.Generator().manual_seed(0))
    mixed = Task(Batch(one.support.x[order], one.support.y[order]), one.query)
    assert read_content(one) == read_content(mixed)
    assert read_content(one).overlap == 0
    assert len(read_content(one).digest) == 32
    others = [task(1), Task(one.query, one.support), Task(one.support, Batch(one.query.x, one.query.y.roll(1, 0)))]
    others.append(Task(Batch(one.support.x[1:], one.support.y[1:]), one.query))
    assert len({read_content(found).digest for found in (one, *others)}) == 5


def test_samples_in_both_sets_are_counted():
    one = task(0)
    query = Batch(*(torch.cat([mine[:2], others]) for mine, others in zip(one.support, one.query, strict=True)))
    assert read_content(Task(one.support, query)).overlap == 2
    relabelled = Batch(one.support.x, one.support.y.roll(1, 0))
    same = sum(bool(a == b) for a, b in zip(one.support.y, relabelled.y, strict=True))
    assert read_content(Task(one.support, relabelled)).overlap == same, "the same x with another y is no overlap"


def test_a_step_on_poison_rounds_only_is_skipped_and_recorded(tmp_path, empty):
    fill(empty, [poison()])
    before = play(tmp_path, empty, 0)
    assert play(tmp_path, empty, 1) == before
    (line,) = lines(tmp_path)
    assert line["steps"] == [{"norm": None, "skipped": "not_finite"}]


class CountingBuffer(HistoryBuffer):
    """A buffer that counts the tasks requested from it, prefetched or not."""

    requests = 0

    def __getitem__(self, round, /):
        CountingBuffer.requests += 1
        return super().__getitem__(round)

    def gather(self, rounds):
        found = super().gather(rounds)
        if isinstance(found, StackedTasks):  # Others were requested one by one.
            CountingBuffer.requests += len(rounds)
        return found


def count_requests_by_round(folder, history, replay):
    requests_by_round = []
    with opened(folder, history, changed(SETTINGS, meta={"replay": replay})) as run:
        for _ in range(ROUNDS):
            before = CountingBuffer.requests
            play_update(run, 1)
            requests_by_round.append(CountingBuffer.requests - before)
    return requests_by_round


def test_a_late_round_reads_no_more_tasks_than_an_early_one(tmp_path, history, monkeypatch):
    monkeypatch.setattr("trainers.loop.rounds.HistoryBuffer", CountingBuffer)
    batch, inner_steps = SETTINGS.meta.batch, SETTINGS.inner.steps
    requests_by_round = count_requests_by_round(tmp_path / "uniform", history, "uniform")
    assert requests_by_round[batch:] == [1 + batch + batch * (inner_steps + 1)] * (ROUNDS - batch)
    growing = count_requests_by_round(tmp_path / "all", history, "all")
    assert growing[-1] > growing[batch] > requests_by_round[-1]


def test_rounds_that_share_an_update_are_scored_with_the_same_leader(tmp_path, history):
    settings = changed(SETTINGS, meta={"max_rounds_per_update": 4})
    with opened(tmp_path, history, settings) as run:
        learner = run.learners["ftml"]
        for first, last in ((0, 4), (4, 8), (8, 9)):
            leader = Meta({name: w.clone() for name, w in leader_of(run).weights.items()}, {})
            play_update(run, len(history) - run.round)
            fresh = lines(tmp_path)[first:]
            assert [line["round"] for line in fresh] == list(range(first, last))
            for line in fresh:
                right = score_task(learner.inner, leader, history[line["round"]])
                assert line["loss_after"] == right.loss_after
            assert [len(line["steps"]) for line in fresh] == [0] * (len(fresh) - 1) + [1]
            assert not torch.equal(*(next(iter(meta.weights.values())) for meta in (leader, leader_of(run))))
    assert [tuple(plan) for plan in read_plans(RunFiles(tmp_path).update_log)] == [(0, 4), (4, 4), (8, 1)]


def test_a_shared_update_stops_at_the_requested_round(tmp_path, history):
    play(tmp_path, history, 3, changed(SETTINGS, meta={"max_rounds_per_update": 4}))
    assert len(lines(tmp_path)) == 3
    assert [tuple(plan) for plan in read_plans(RunFiles(tmp_path).update_log)] == [(0, 3)]


@pytest.mark.parametrize("late", [False, True])
def test_lines_are_durable_before_the_checkpoint_that_follows_them(tmp_path, history, monkeypatch, late):
    """A checkpoint cannot restore lines of its rounds that were lost."""
    operations = []
    fsync, rename = os.fsync, os.rename
    paths = {"rounds.jsonl", "manifest.json"}

    def record_fsync(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        operations.extend([name] if name in paths else [])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (operations.append("renamed"), rename(a, b))[1])
    play(tmp_path, history, 4 if late else 3)
    once = ["rounds.jsonl", "manifest.json", "renamed"]
    assert operations == once * (2 if late else 1)


BASELINES = tuple(
    name for name in registry.names(online_meta.learners) if name != MAIN_LEARNER and answers_numbers(name)
)
QUICK = {"from_scratch": {"steps": 2}, "moml": {"steps": 2}, "c_maml": {"gamma": -1000.0}}
"""Options that keep the tests short, and with which Continual-MAML answers with its slow weights."""


def with_option(option):
    """Return the baselines with an option."""
    builds = {name: registry.load(online_meta.learners, name) for name in BASELINES}
    return tuple(name for name, build in builds.items() if option in inspect.signature(build).parameters)


def play_baselines(folder, history, **sections):
    """Return the lines of every learner over three rounds; every baseline plays."""
    regret = sections.pop("regret", {})
    options = {name: QUICK.get(name, {}) | regret.get("options", {}).get(name, {}) for name in BASELINES}
    regret = {**regret, "baselines": BASELINES, "options": {name: own for name, own in options.items() if own}}
    play(folder, history, 3, changed(SETTINGS, regret=regret, **sections))
    return {name: [line["learners"][name] for line in lines(folder)] for name in (MAIN_LEARNER, *BASELINES)}


@pytest.mark.parametrize(
    "meta",
    [{"lr": 0.1}, {"optimizer": "sgd"}, {"clip_norm": 1e-3}, {"schedule": "cosine", "schedule_options": {"rounds": 3}}],
)
def test_the_optimizer_of_meta_changes_no_baseline(tmp_path, history, meta):
    usual, other = play_baselines(tmp_path / "usual", history), play_baselines(tmp_path / "other", history, meta=meta)
    assert {name for name in usual if usual[name] != other[name]} == {MAIN_LEARNER}


@pytest.mark.parametrize("own", [{"lr": 0.1}, {"optimizer": "sgd"}, {"steps": 3}], ids=["lr", "optimizer", "steps"])
def test_a_baseline_has_options_of_its_own(tmp_path, history, own):
    names = with_option(next(iter(own)))
    assert {"online_reptile", "moml"} <= {*names} < {*BASELINES}
    usual = play_baselines(tmp_path / "usual", history)
    for name in names:
        other = play_baselines(tmp_path / name, history, regret={"options": {name: own}})
        assert {learner for learner in usual if usual[learner] != other[learner]} == {name}


def test_baselines_step_with_meta_on_request_and_a_run_keeps_to_its_way(tmp_path, history):
    regret = {"baselines": BASELINES, "options": QUICK, "baseline_optimizer": "meta"}
    whole = play_baselines(tmp_path / "whole", history, regret={"baseline_optimizer": "meta"}, meta={"lr": 0.1})
    own = play_baselines(tmp_path / "own", history, meta={"lr": 0.1})
    assert {name for name in whole if whole[name] != own[name]} == {*with_option("optimizer")}
    play(tmp_path / "cut", history, 2, changed(SETTINGS, regret=regret, meta={"lr": 0.1}))
    cut = play_baselines(tmp_path / "cut", history, meta={"lr": 0.1})  # The configuration says "own" by now.
    assert cut == whole
