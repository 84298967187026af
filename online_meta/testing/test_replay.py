"""What every replay policy of ``online_meta.replay`` keeps."""

import functools
import itertools
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

import online_meta.replay
from online_meta import registry
from online_meta.replay import ReplayRequest, ReplaySample, generator
from online_meta.replay.reservoir import reservoir
from online_meta.replay.stratified import stratified
from online_meta.replay.uniform import uniform
from online_meta.types import Meta, MetaGrad

FOLDER = {name: registry.load(online_meta.replay, name) for name in registry.names(online_meta.replay)}
SMALL = {"recent": {"window": 30}, "reservoir": {"size": 40}, "prioritised": {"size": 40}, "coreset": {"size": 20}}
"""Options that are felt within the rounds that are played here."""

POLICIES = {
    **{name: partial(make, **SMALL.get(name, {})) for name, make in FOLDER.items()},
    "prioritised by loss": partial(FOLDER["prioritised"], by="loss", size=40),
}
UNBOUNDED = {"all"}
"""The policies that do not obey ``batch``."""

BIASED = {"recent", "coreset"}
"""The policies that follow something else than the mean over all rounds, and say so."""

every_policy = pytest.mark.parametrize("name", POLICIES)


@functools.cache
def gradient_of(round, width=4):
    """Return a meta-gradient that is a function of the round, of a norm that differs a lot from round to round."""
    values = np.random.default_rng(round).standard_normal(width) * (1 + round % 7) ** 2
    return MetaGrad(torch.tensor(float(1 + round % 5)), Meta({"w": torch.from_numpy(values)}, {}))


def play(replay, rounds, batch=5, steps=2, seed=0, gone=(), memory=None, first=0):
    """Play rounds as a learner does; yield (draw, picks, memory before the draw, memory after it)."""
    memory = replay.start() if memory is None else memory
    for round in range(first, rounds):
        kept = range(round + 1) if not gone else [one for one in range(round + 1) if one not in gone or one == round]
        request = ReplayRequest(seed, round, 0, kept, batch)
        memory = replay.begin_round(memory, request)
        for step in range(steps):
            request = request._replace(step=step)
            samples, before = replay.sample(memory, request), memory
            if replay.measure is not None:
                measured = sorted(sample.round for sample in samples)
                values = torch.stack([replay.measure(gradient_of(one)) for one in measured])
                memory = replay.record(memory, request, measured, values.double())
            yield request, samples, before, memory


def bits(memory):
    return {name: (value.dtype, value.tolist()) for name, value in memory.items()}


@every_policy
@pytest.mark.parametrize("gone", [(), range(10, 60, 3)], ids=["all are kept", "some are gone"])
@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_picks_are_distinct_kept_rounds_of_positive_weight_and_no_more_than_asked_for(name, gone, batch):
    for request, samples, *_ in play(POLICIES[name](), 80, batch, gone=gone):
        rounds = [sample.round for sample in samples]
        assert samples, request
        assert all(isinstance(round, int) and round in request.rounds for round in rounds), request
        assert len(set(rounds)) == len(rounds), request
        assert all(np.isfinite(sample.weight) and sample.weight > 0 and sample.share >= 1 for sample in samples), (
            request
        )
        if name not in UNBOUNDED:
            assert len(samples) <= request.batch, request


@every_policy
def test_what_it_answers_and_remembers_is_a_pure_function_of_what_it_was_asked_and_told(name):
    def story():
        return [(samples, bits(after)) for _, samples, _, after in play(POLICIES[name](), 60)]

    first = story()
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    assert story() == first


@every_policy
def test_it_writes_to_no_memory_that_it_was_given(name):
    replay = POLICIES[name]()
    kept = [(before, bits(before)) for _, _, before, _ in play(replay, 60)]
    assert all(bits(memory) == value for memory, value in kept)


@every_policy
def test_it_goes_on_from_a_memory_that_was_saved(name):
    replay = POLICIES[name]()
    whole = [(samples, bits(after)) for _, samples, _, after in play(replay, 60)]
    *_, (_, _, _, saved) = play(replay, 33)
    rest = play(POLICIES[name](), 60, memory={key: value.clone() for key, value in saved.items()}, first=33)
    assert whole[66:] == [(samples, bits(after)) for _, samples, _, after in rest]


@every_policy
@pytest.mark.parametrize("count", [1, 2, 24, 25])
def test_everything_is_revisited_alike_while_it_fits(name, count):
    *_, (_, samples, _, _) = play(FOLDER[name.split()[0]](), count, batch=50)
    assert sorted(sample.round for sample in samples) == list(range(count))
    assert {sample.weight / sample.share for sample in samples} == {1.0}


@every_policy
def test_memory_does_not_grow_with_the_rounds(name):
    replay = POLICIES[name]()
    sizes = [sum(value.nbytes for value in after.values()) for *_, after in play(replay, 300, steps=1)]
    assert max(sizes[150:]) == max(sizes[:150])


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - BIASED))
def test_the_expected_step_is_that_of_the_mean_over_all_rounds(name):
    """The mean estimate of a vector over many seeds, in units of its standard error: |z| in each coordinate."""
    count, batch, seeds, width = 60, 6, 400, 4
    right = sum(gradient_of(round, width).grads.weights["w"] for round in range(count)) / count
    found = []
    for seed in range(seeds):
        *_, (_, samples, _, _) = play(POLICIES[name](), count, batch, steps=1, seed=seed)
        total = sum(sample.weight * gradient_of(sample.round, width).grads.weights["w"] for sample in samples)
        found.append(total / sum(sample.share for sample in samples))
    estimates = torch.stack(found)
    error = estimates.std(0) / seeds**0.5 + 1e-12
    assert float(((estimates.mean(0) - right).abs() / error).max()) < 3.5  # 4 coordinates: 0.2 %, and seeds are fixed


def test_prioritised_draws_without_their_weights_would_be_seen():
    """What the test above would say of a policy that forgot them."""
    count, seeds = 60, 150
    right = sum(gradient_of(round).grads.weights["w"] for round in range(count)) / count
    found = []
    for seed in range(seeds):
        *_, (_, samples, _, _) = play(POLICIES["prioritised"](), count, 6, steps=1, seed=seed)
        found.append(sum(gradient_of(sample.round).grads.weights["w"] * sample.share for sample in samples) / 6)
    estimates = torch.stack(found)
    assert float(((estimates.mean(0) - right).abs() / (estimates.std(0) / seeds**0.5)).max()) > 5


def test_uniform_draws_every_pair_of_rounds_alike():
    count, draws = 6, 9000
    asked = (ReplayRequest(9, count - 1, step, range(count), 2) for step in range(draws))
    pairs = Counter(frozenset(sample.round for sample in uniform().sample({}, request)) for request in asked)
    expected = draws / 15
    assert len(pairs) == 15
    assert sum((seen - expected) ** 2 / expected for seen in pairs.values()) < 36.1  # 99.9 % at 14 degrees of freedom


@every_policy
def test_each_part_of_a_draws_name_changes_it(name):
    if name in UNBOUNDED:
        return
    *_, (request, _, memory, _) = play(POLICIES[name](), 80)
    asked = [request, request._replace(seed=5), request._replace(step=7), request._replace(round=request.round + 1)]
    samples = [POLICIES[name]().sample(memory, one) for one in asked]
    assert all(one != other for one, other in itertools.combinations(samples, 2))


def test_stratified_draws_once_in_every_stretch():
    for step in range(50):
        samples = stratified().sample({}, ReplayRequest(1, 99, step, range(100), 10))
        assert [sample.round // 10 for sample in samples] == list(range(10))


def test_a_reservoir_is_a_uniform_sample_at_any_time():
    """Each of 40 rounds is among the 10 of 2,000 reservoirs as often: a chi-square of 39 degrees of freedom."""
    count, size, seeds = 40, 10, 2000
    seen = np.zeros(count)
    for seed in range(seeds):
        memory = reservoir(size).start()
        for round in range(count):
            memory = reservoir(size).begin_round(memory, ReplayRequest(seed, round, 0, range(round + 1), 1))
        seen[memory["rounds"].numpy()] += 1
    share = size / count
    variance = seeds * share * (1 - share) * count / (count - 1)
    assert float(np.square(seen - seeds * share).sum()) / variance < 72.1  # the 99.9 % point


def test_recent_and_bounded_policies_touch_only_what_is_theirs():
    for name, oldest in (("recent", 270), ("reservoir", 0)):
        touched = {
            sample.round
            for request, samples, *_ in play(POLICIES[name](), 300)
            if request.round == 299
            for sample in samples
        }
        assert min(touched) >= oldest


def test_prioritised_revisits_a_round_the_more_the_larger_its_gradient():
    met = Counter()
    for request, samples, *_ in play(FOLDER["prioritised"](), 400, 10, steps=4):
        if request.round >= 100:
            met.update({sample.round % 7: sample.share for sample in samples if sample.round < 98})
    assert [met[k] for k in range(7)] == sorted(met[k] for k in range(7))
    assert met[6] > 4 * met[0]


def test_a_round_without_a_finite_gradient_is_revisited_least():
    replay = FOLDER["prioritised"]()
    *_, (request, _, memory, _) = play(replay, 100)
    memory = replay.record(memory, request, [40], torch.full((1, 1), torch.nan, dtype=torch.float64))
    assert memory["priorities"][40] == 0


def test_a_coreset_stands_for_all_rounds():
    """Its weighted sum of gradients is nearer to that of all than that of as many rounds drawn evenly."""
    replay, count, size = FOLDER["coreset"](size=20, width=64), 200, 20

    def of(round):
        values = np.random.default_rng(round % 10).standard_normal(64) + 0.05 * gradient_of(round, 64).loss.item()
        return torch.from_numpy(values)

    memory = replay.start()
    for round in range(count):
        request = ReplayRequest(0, round, 0, range(round + 1), 4)
        memory = replay.begin_round(memory, request)
        rounds = sorted(sample.round for sample in replay.sample(memory, request))
        seen = [replay.measure(MetaGrad(torch.zeros(()), Meta({"w": of(one)}, {}))) for one in rounds]
        memory = replay.record(memory, request, rounds, torch.stack(seen))
    right = sum(of(round) for round in range(count)) / count
    assert float(memory["weights"].sum()) == count
    core = sum(w * of(round) for round, w in zip(memory["rounds"].tolist(), memory["weights"], strict=True)) / count
    chance = random.Random(0)
    drawn = [sum(map(of, chance.sample(range(count), size))) / size for _ in range(200)]
    errors = sorted(float((one - right).norm()) for one in drawn)
    assert float((core - right).norm()) < 0.5 * errors[100]


@pytest.mark.parametrize("gone", [(), range(10, 40, 3)], ids=["all are kept", "some are gone"])
def test_a_coreset_knows_how_far_apart_its_rounds_are_without_measuring_all_again(gone):
    for *_, memory in play(POLICIES["coreset"](), 60, gone=gone):
        rows = memory["sketches"].double()
        torch.testing.assert_close(memory["apart"], (rows[:, None] - rows[None]).norm(dim=2), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("recent", {"window": 0}),
        ("reservoir", {"size": 0}),
        ("prioritised", {"size": 0}),
        ("prioritised", {"by": "los"}),
        ("prioritised", {"exponent": -1.0}),
        ("prioritised", {"uniform_share": 0.0}),
        ("coreset", {"size": 0}),
        ("coreset", {"width": 0}),
    ],
)
def test_what_makes_no_sense_is_refused(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FOLDER[name](**wrong)


def test_a_generator_is_a_function_of_its_key_that_other_versions_must_keep():
    """Parameters that a run has learned depend on these numbers; a change of them breaks every resumed run."""
    assert generator(0, 0, 0).integers(2**32, size=3).tolist() == [582496169, 60417458, 4027530181]
    request = ReplayRequest(7, 99, 1, range(100), 5)
    assert uniform().sample({}, request) == [ReplaySample(round) for round in (2, 11, 17, 28, 84)]
    sample = reservoir(5).begin_round(reservoir(5).start(), request)["rounds"].tolist()
    assert sample == [12, 45, 56, 94, 97]
