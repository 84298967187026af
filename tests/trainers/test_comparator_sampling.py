"""A comparator's sum over rounds of which retention has kept some: unbiased, with an interval that covers the truth."""

import math

import numpy as np
import pytest
import torch

from online_meta.learners import MemoryReplayBuffer
from streams.history.history import History
from streams.history.retention import DAY_SECONDS, RetentionSettings, subsample
from streams.types import Record
from tests.support.runs import task
from tests.trainers.test_hindsight import losses_only, refresh_hindsight
from trainers.comparators._sampling import estimate_sum, find_coverage, sample_rounds
from trainers.loop.task_prefetch import HistoryBuffer

ROUNDS = 600
RUNS = 400


class Retained(MemoryReplayBuffer):
    """A buffer of which retention has kept some rounds, of known strata."""

    def __init__(self, kept, strata):
        super().__init__()
        self._kept, self._strata = kept, strata

    def available(self, count):
        return self._kept[self._kept < count]

    def retention_strata(self, rounds):
        return self._strata[rounds]


def losses_of(random):
    """Losses that fall along the stream and differ by source: source 1, every fifth round, is twice as hard."""
    sources = (np.arange(ROUNDS) % 5 == 0).astype(int)
    return (2 + 4 * np.exp(-np.arange(ROUNDS) / 200)) * (1 + sources) * random.lognormal(0, 0.3, ROUNDS), sources


def keep_by_age(random, sources):
    return np.arange(ROUNDS - 150, ROUNDS), np.zeros(ROUNDS, int)


def keep_a_reservoir(random, sources):
    decided = 500
    kept = np.sort(random.choice(decided, 100, replace=False))
    return np.concatenate([kept, np.arange(decided, ROUNDS)]), np.where(np.arange(ROUNDS) < decided, 1, 0)


def keep_as_many_of_each_source(random, sources):
    decided = 500
    parts = [random.choice(np.flatnonzero(sources[:decided] == source), 50, replace=False) for source in (0, 1)]
    strata = np.where(np.arange(ROUNDS) < decided, 1 + sources, 0)
    return np.sort(np.concatenate([*parts, np.arange(decided, ROUNDS)])), strata


@pytest.mark.parametrize("keep", [keep_by_age, keep_a_reservoir, keep_as_many_of_each_source])
def test_the_95_percent_interval_covers_the_sum_over_the_covered_rounds(keep):
    covered, errors = 0, []
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        losses, sources = losses_of(random)
        coverage = find_coverage(Retained(*keep(random, sources)), range(ROUNDS), ())
        sample = sample_rounds(coverage, 160, seed)
        found = estimate_sum(losses[sample.rounds].tolist(), sample.weights)
        truth = losses[coverage.first :].sum()
        assert sum(sample.weights) == pytest.approx(ROUNDS - coverage.first)
        covered += abs(found.total - truth) <= 1.96 * math.sqrt(found.variance) + 1e-9 * truth
        errors.append(found.total - truth)
    assert covered >= 0.92 * RUNS
    assert abs(np.mean(errors)) < 3.5 * np.std(errors) / math.sqrt(RUNS), "the estimate is unbiased"


def test_equal_weights_would_be_biased():
    """What find_coverage corrects: recent rounds, all of which are kept, are easier than those before."""
    errors = []
    for seed in range(100):
        random = np.random.default_rng(seed)
        losses, sources = losses_of(random)
        kept, _ = keep_a_reservoir(random, sources)
        errors.append(losses[kept].sum() * ROUNDS / len(kept) / losses.sum() - 1)
    assert abs(np.mean(errors)) > 0.05


def test_coverage_begins_after_rounds_that_are_gone_by_age_and_not_after_a_gap_by_chance():
    strata = np.zeros(ROUNDS, int)
    old = find_coverage(Retained(np.arange(200, ROUNDS), strata), range(ROUNDS), ())
    assert (old.first, set(old.weights)) == (200, {1.0})
    thin = find_coverage(Retained(np.arange(45, ROUNDS, 10), strata), range(ROUNDS), ())
    assert (thin.first, thin.weights.sum()) == (0, pytest.approx(ROUNDS))
    skipped = find_coverage(Retained(np.arange(50, ROUNDS), strata), range(ROUNDS), range(50))
    assert (skipped.first, set(skipped.weights)) == (0, {1.0})


def test_the_comparator_names_the_first_round_that_it_covers():
    losses = torch.linspace(5, 1, 60, dtype=torch.float64)
    setup = losses_only(losses, 0)
    setup.buffer.available = lambda count: range(40, count)
    found = refresh_hindsight(setup, 60, 0, 100, None).comparator
    assert (found.first_round, found.evaluated, found.standard_error) == (40, 20, 0.0)
    assert found.cumulative_loss == pytest.approx(float(losses[40:].sum()))


def test_the_strata_of_a_history_are_its_sources_below_the_last_decision(tmp_path):
    with History.open(tmp_path / "history", write=True) as history:
        for first in (0, 40):
            history.append([record(t) for t in range(first, first + 40)])
            if not first:
                subsample(history, RetentionSettings(rounds=10, thin="stratified", strata=("source",)))
        buffer = HistoryBuffer(history, torch.device("cpu"))
        kept = np.asarray(buffer.available(80))
        labels = buffer.retention_strata(np.arange(80))
        assert [len({*labels[:40]}), {*labels[40:]}] == [2, {0}]
        coverage = find_coverage(buffer, range(80), ())
        weights = dict(zip(coverage.rounds.tolist(), coverage.weights.tolist(), strict=True))
        assert all(weights[round] == 1.0 for round in range(40, 80))
        for source, count in (("rare", 8), ("usual", 32)):
            own = [round for round in kept.tolist() if round < 40 and source_of(round) == source]
            assert [weights[round] for round in own] == pytest.approx([count / len(own)] * len(own))
        buffer.close()


def source_of(round):
    return "rare" if round % 5 == 0 else "usual"


def record(round):
    from streams.formats import wire

    payload = wire.encode(task(round))
    return Record(f"t{round}", payload, wire.digest(payload), source_of(round), str(round), round * DAY_SECONDS)
