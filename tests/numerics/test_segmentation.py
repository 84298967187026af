"""The posterior over run lengths equals enumeration of all segmentations; predictions equal closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from scipy.stats import multivariate_t

from online_meta.changepoints.detectors.loss_jump import loss_jump
from online_meta.changepoints.detectors.run_length import run_length
from online_meta.changepoints.likelihoods.gaussian_classes import gaussian_classes
from online_meta.changepoints.likelihoods.linear import linear
from online_meta.changepoints.segments import Likelihood, segment_samples
from online_meta.testing.segmented import draw_classes, draw_lines

PRIOR = {"strength": 0.5, "shape": 1.5, "spread": 0.7}


def evidence_of_targets(samples) -> float:
    """Return log p of all targets of a run: y ~ t_{2a}(0, b/a (I + F F' / strength)), a column per output."""
    if not samples:
        return 0.0
    seen = np.stack([np.concatenate([[1.0], x.double().numpy()]) for x, _ in samples])
    targets = np.stack([y.double().numpy() for _, y in samples])
    scale = PRIOR["spread"] / PRIOR["shape"] * (np.eye(len(seen)) + seen @ seen.T / PRIOR["strength"])
    return sum(
        float(multivariate_t.logpdf(column, np.zeros(len(seen)), scale, df=2 * PRIOR["shape"])) for column in targets.T
    )


def evidence_of_labels(samples, ways: int = 3, concentration: float = 2.0) -> float:
    """Return log p of all samples of a run: Dirichlet-multinomial labels, a joint t for each feature of a class."""
    counts = np.bincount([int(y) for _, y in samples], minlength=ways)
    total = gammaln(ways * concentration) - gammaln(ways * concentration + counts.sum())
    total += sum(gammaln(concentration + count) - gammaln(concentration) for count in counts)
    for label in range(ways):
        values = np.array([x.double().numpy() for x, y in samples if int(y) == label])
        if len(values):
            wide = np.eye(len(values)) + np.ones((len(values), len(values))) / PRIOR["strength"]
            scale = PRIOR["spread"] / PRIOR["shape"] * wide
            for column in values.T:
                total += multivariate_t.logpdf(column, np.zeros(len(values)), scale, df=2 * PRIOR["shape"])
    return float(total)


CASES = {
    "linear": (linear(2, 1, **PRIOR), draw_lines, evidence_of_targets),
    "gaussian_classes": (gaussian_classes(2, 3, concentration=2.0, **PRIOR), draw_classes, evidence_of_labels),
}
every_case = pytest.mark.parametrize(("likelihood", "draw", "evidence"), CASES.values(), ids=CASES)


@every_case
def test_sequential_predictions_multiply_to_the_closed_form(likelihood, draw, evidence):
    samples = draw(5, [7, 5])
    runs, total = likelihood.start(), 0.0
    for count, (x, y) in enumerate(samples):
        total += float(likelihood.score(runs, x, y))
        runs = likelihood.update(runs, x, y)
        assert total == pytest.approx(evidence(samples[: count + 1]), abs=1e-9)


def test_the_likelihood_of_a_vector_target_is_a_product_over_its_entries():
    likelihood = linear(2, 2, **PRIOR)
    pairs = zip(draw_lines(1, [6]), draw_lines(2, [6]), strict=True)
    samples = [(x, torch.cat([y, other])) for (x, y), (_, other) in pairs]
    runs, total = likelihood.start(), 0.0
    for x, y in samples:
        total += float(likelihood.score(runs, x, y))
        runs = likelihood.update(runs, x, y)
    assert total == pytest.approx(evidence_of_targets(samples), abs=1e-9)


def enumerate_runs(samples, evidence, hazard, least):
    """Return p(the last run has r samples | all samples) for r = 1 .. n, summed over all segmentations."""
    n = len(samples)
    spans = {(a, b): evidence(samples[a:b]) for b in range(1, n + 1) for a in range(b)}
    logs = {r: [] for r in range(1, n + 1)}
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [0, *(at + 1 for at, cut in enumerate(cuts) if cut), n]
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        if any(length < least for length in lengths[:-1]):
            continue
        may_cut = sum(max(length - least, 0) for length in lengths)  # places where a run could end and did not
        prior = (len(lengths) - 1) * math.log(hazard) + may_cut * math.log1p(-hazard)
        logs[lengths[-1]].append(prior + sum(spans[span] for span in itertools.pairwise(ends)))
    weights = np.array([sum(math.exp(one) for one in logs[r]) for r in range(1, n + 1)])
    return weights / weights.sum()


@every_case
@pytest.mark.parametrize(("hazard", "least"), [(0.1, 1), (0.4, 2), (0.02, 3)])
def test_the_posterior_equals_enumeration_of_all_segmentations(likelihood, draw, evidence, hazard, least):
    samples = draw(7, [4, 3, 2])
    segmenter = run_length(likelihood, hazard=hazard, least=least)
    memory = segmenter.start()
    for count, (x, y) in enumerate(samples, 1):
        memory = segmenter.update(memory, x, y)
        if count not in (1, 4, 7, 9):
            continue
        expected = enumerate_runs(samples[:count], evidence, hazard, least)
        found = np.zeros(count)
        found[memory["lengths"].numpy() - 1] = memory["logs"].exp().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_change_is_reported_when_certain_enough_at_its_most_probable_place():
    likelihood, draw, evidence = CASES["linear"]
    samples = draw(0, [5, 4])
    posteriors = [enumerate_runs(samples[:n], evidence, 0.1, 1) for n in range(1, 10)]
    assert any(0.5 < 1 - posterior[-1] < 0.99 for posterior in posteriors), "the thresholds below differ in time"
    for certainty in (0.5, 0.9, 0.99):
        (first, *_) = segment_samples(run_length(likelihood, hazard=0.1, least=1, certainty=certainty), samples, 1000)
        when = next(n for n, p in enumerate(posteriors, 1) if 1 - p[-1] >= certainty)
        assert (first.detected_at, first.end) == (when, when - 1 - int(posteriors[when - 1][:-1].argmax()))


def test_pruning_keeps_the_most_probable_run_lengths_and_the_longest():
    likelihood, draw, _ = CASES["linear"]
    samples = draw(3, [60])
    few, all_of_them = (run_length(likelihood, hazard=0.05, hypotheses=many) for many in (6, 100))
    memory, whole = few.start(), all_of_them.start()
    for count, (x, y) in enumerate(samples, 1):
        memory, whole = few.update(memory, x, y), all_of_them.update(whole, x, y)
        assert len(memory["lengths"]) <= 6
        assert int(memory["lengths"][0]) == count
    assert len(whole["lengths"]) == 59
    assert float(memory["logs"].exp().sum()) == pytest.approx(1.0)
    chances = dict(zip(whole["lengths"].tolist(), whole["logs"].exp().tolist(), strict=True))
    kept = {length: chances[length] for length in memory["lengths"].tolist()}
    assert sum(kept.values()) > 0.9, "the dropped run lengths are improbable"
    assert float(memory["logs"][0].exp()) == pytest.approx(chances[60], rel=0.1)


def losses_as_given() -> Likelihood:
    """Return a likelihood in which the loss of a sample is its target, and a run counts its samples."""
    return Likelihood(
        lambda: {"met": torch.zeros(1)},
        lambda runs, x, y: -y.double().reshape(1),
        lambda runs, x, y: {"met": runs["met"] + 1},
    )


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        # windows of two: 1, 1 | 1, 2 rises by .5; 1, 1 | 2, 4 rises by 2 > 1.9, and the sixth sample is the first above
        ([1, 1, 1, 1, 2, 4], {"jump": 1.9, "window": 2, "least": 2}, (5, 6)),
        ([1, 1, 1, 1, 3, 4], {"jump": 1.9, "window": 2, "least": 2}, (4, 6)),
        ([1, 1, 1, 1, 2, 4], {"jump": 2.1, "window": 2, "least": 2}, None),
        ([1, 1, 1, 1, 2, 4], {"jump": 1.9, "window": 2, "least": 6}, None),
        ([1, 1, 1, 1, 2, 4], {"jump": 1.9, "window": 1, "least": 1}, (5, 6)),
        ([1, 1, 1, 1, 2, 4], {"jump": 0.9, "window": 1, "least": 1}, (4, 5)),
        ([4, 3, 2, 1, 0, 0], {"jump": 0.1, "window": 1, "least": 1}, None),
        ([0, 9], {"jump": 1.0, "window": 1, "least": 1}, (1, 2)),
        ([0, 9], {"jump": 1.0, "window": 1, "least": 2}, None),
        ([0, 0, 9], {"jump": 1.0, "window": 2, "least": 1}, None),
    ],
)
def test_a_jump_is_found_at_the_expected_sample(losses, options, expected):
    segmenter = loss_jump(losses_as_given(), **options)
    memory, found = segmenter.start(), None
    for seen, loss in enumerate(losses, 1):
        memory = segmenter.update(memory, torch.zeros(1), torch.tensor([float(loss)]))
        count = segmenter.change(memory)
        if count is not None and found is None:
            found = (count, seen)
    assert found == expected


def test_random_features_fit_nonlinear_data():
    random = torch.Generator().manual_seed(0)
    xs = 10 * torch.rand(200, 1, generator=random) - 5
    totals = {}
    for features in (0, 50):
        likelihood = linear(1, 1, features=features, scale=1.5, strength=0.1)
        runs, totals[features] = likelihood.start(), 0.0
        for x in xs:
            y = 3 * torch.sin(x - 1)
            totals[features] += float(likelihood.score(runs, x, y))
            runs = likelihood.update(runs, x, y)
    assert totals[50] > totals[0] + 200


def test_projections_keep_the_difference_of_high_dimensional_inputs():
    likelihood = gaussian_classes(400, 2, features=8)
    runs = likelihood.start()
    assert runs["means"].shape == (1, 2, 8)
    image = torch.ones(400)
    for _ in range(5):
        runs = likelihood.update(runs, image, torch.tensor(1))
    assert float(likelihood.score(runs, image, torch.tensor(1))) > float(
        likelihood.score(runs, -image, torch.tensor(1))
    )
