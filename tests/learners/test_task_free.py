"""A stream without task boundaries, played by an untrained leader, agrees with a step-by-step reference."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import digamma
from torch import nn

import online_meta as om
from online_meta.answers import bind_meta
from online_meta.changepoints.detectors.run_length import run_length
from online_meta.changepoints.leader_likelihood import leader_likelihood
from online_meta.changepoints.segments import Segmenter, segment_adaptively, segment_samples
from online_meta.changepoints.task_free import estimate_errors, make_task, play_task_free
from online_meta.testing.segmented import draw_lines
from online_meta.types import PrefixScore, Score

SIZES = (1, 2, 4, 8)
LENGTHS = [30, 25, 40, 22, 30, 35]
ENDS = [30, 55, 95, 117, 147]
SEGMENTER = partial(run_length, hazard=0.002, certainty=0.99, least=10, hypotheses=8)


def leader(outputs=1, loss="mse", lr=0.2, steps=3, learner=om.FollowTheMetaLeader):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=lr), steps)
    engine = om.MetaOptimizer(inner.init(dict(module.named_parameters())), "adam", 0.01)
    return learner(inner, om.exact(inner), engine, batch=3, steps_per_round=2)


def play(learner, samples, **options):
    return list(play_task_free(learner, SEGMENTER, samples, **{"sizes": SIZES, **options}))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_obvious_changes_are_detected_by_an_untrained_leader(seed):
    played = play(leader(), draw_lines(seed, LENGTHS))
    assert [one.segment.end for one in played] == pytest.approx([*ENDS, sum(LENGTHS)], abs=1)
    assert all(one.score is not None for one in played)


def test_changes_of_labels_are_detected_from_the_cross_entropy():
    """The labels change their meaning; the distribution of the inputs does not change."""
    centres = torch.tensor([[3.0, 0.0], [-2.0, 3.0], [-2.0, -3.0]])
    random = torch.Generator().manual_seed(0)
    samples = [
        (centres[kind] + 0.3 * torch.randn(2, generator=random), (kind + run) % 3)
        for run, length in enumerate(LENGTHS)
        for kind in torch.randint(3, (length,), generator=random)
    ]
    played = play(leader(3, "cross_entropy", 0.5, 10), samples, squared_error=False)
    assert [one.segment.end for one in played] == pytest.approx([*ENDS, sum(LENGTHS)], abs=2)


def expected(scores, shape):
    """Return the expected errors from (losses by size) of the newest scores, with numpy and scipy."""
    found = []
    for size in (0, *SIZES):
        losses = [losses[size] for losses in scores if size in losses]
        found.append(np.exp(np.mean(np.log(losses)) + digamma(shape) - np.log(shape)) if losses else 1.0)
    return found


def scores_of(likelihood, samples):
    """Return the likelihood's scores of the first samples of a run."""
    runs, said = likelihood.start(), []
    for x, y in samples[:4]:
        said.append(float(likelihood.score(runs, x, y)))
        runs = likelihood.update(runs, x, y)
    return said


def loss_after(learner, part, size):
    x, y = (torch.stack([sample[half] for sample in part]) for half in (0, 1))
    meta, middle = learner.engine.meta(), len(x) // 2
    weights = learner.inner.adapt(meta, om.Batch(x[:size], y[:size])) if size else meta.weights
    return float(learner.inner.loss(weights, om.Batch(x[middle:], y[middle:])))


def test_each_segment_is_cut_by_the_leader_that_then_scores_and_learns_it():
    samples, shape, window = draw_lines(1, LENGTHS), 1.5, 2
    said = []

    def segmenter(likelihood):
        said.append(scores_of(likelihood, samples))
        return SEGMENTER(likelihood)

    played = list(play_task_free(leader(), segmenter, samples, sizes=SIZES, shape=shape, window=window, max_samples=33))
    reference, scores, begin = leader(), [], 0
    for segment, score in played:
        errors, meta = expected(scores[-window:], shape), reference.engine.meta()
        likelihood = leader_likelihood(
            bind_meta(reference.inner, meta), reference.inner.loss, *samples[0], sizes=SIZES, errors=errors, shape=shape
        )
        assert said.pop(0) == pytest.approx(scores_of(likelihood, samples), rel=1e-5)
        first, *_ = segment_samples(SEGMENTER(likelihood), samples[begin:], 33)
        assert (segment.begin, segment.end, segment.detected_at) == (
            begin,
            begin + first.end,
            begin + first.detected_at,
        )
        size = max(size for size in SIZES if 2 * size <= segment.end - begin)
        part = samples[begin : begin + 2 * size]
        losses = {at: loss_after(reference, part, at) for at in (0, *SIZES) if at <= size}
        assert score.loss_before == pytest.approx(losses[0], rel=1e-5)
        assert score.loss_after == pytest.approx(losses[size], rel=1e-5)
        scores.append(losses)
        task = make_task(samples[begin : segment.end], SIZES)
        reference.score(task)
        reference.learn(task)
        begin = segment.end
    assert begin == len(samples)
    assert max(segment.end - segment.begin for segment, _ in played) == 33


def test_a_negative_log_likelihood_is_used_unchanged():
    samples, said = [(torch.randn(2), torch.tensor(at % 3)) for at in range(12)], []

    def segmenter(likelihood):
        said.append(float(likelihood.score(likelihood.start(), *samples[0])))
        return SEGMENTER(likelihood)

    learner = leader(3, "cross_entropy")
    first = om.Batch(samples[0][0][None], samples[0][1][None])
    loss = float(learner.inner.loss(learner.engine.meta().weights, first))
    list(play_task_free(learner, segmenter, samples, sizes=SIZES, squared_error=False))
    assert said == [pytest.approx(-loss)]


class RecordingLearner(om.FollowTheMetaLeader):
    """A learner that records its calls and their numbers of samples."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.calls = []

    def score(self, task, prefixes=()):
        self.calls.append(("score", len(task.support.x), tuple(prefixes)))
        return super().score(task, prefixes)

    def learn(self, *tasks):
        self.calls.append(("learn", len(tasks[0].support.x), len(tasks)))
        return super().learn(*tasks)


def test_a_task_is_scored_and_learned_before_the_next_segment_is_cut():
    learner = leader(learner=RecordingLearner)
    playing = play_task_free(learner, SEGMENTER, draw_lines(1, LENGTHS), sizes=SIZES)
    for round in range(3):
        next(playing)
        assert learner.calls == [("score", 8, SIZES), ("learn", 8, 1)] * (round + 1)


def test_playing_a_stream_is_deterministic():
    samples = draw_lines(3, LENGTHS)
    assert play(leader(), samples) == play(leader(), samples)


def test_a_segment_that_is_too_short_is_not_learned():
    learner = leader(learner=RecordingLearner)
    every = Segmenter(dict, lambda memory, x, y: memory, lambda memory: 3)
    played = list(play_task_free(learner, lambda likelihood: every, draw_lines(0, [9]), sizes=(2, 4)))
    assert [(one.segment.end, one.score) for one in played] == [(3, None), (6, None), (9, None)]
    assert learner.calls == []


@pytest.mark.parametrize(("length", "size"), [(1, None), (2, 1), (3, 1), (4, 2), (7, 2), (8, 4), (60, 8)])
def test_a_task_has_the_first_samples_as_support_and_the_next_as_query(length, size):
    samples = [(torch.tensor([float(at)]), torch.tensor([-float(at)])) for at in range(length)]
    task = make_task(samples, SIZES)
    if size is None:
        assert task is None
        return
    assert task.support.x.flatten().tolist() == [*range(size)]
    assert task.query.x.flatten().tolist() == [*range(size, 2 * size)]
    assert torch.equal(task.support.y, -task.support.x)
    assert torch.equal(task.query.y, -task.query.x)


def test_estimated_errors_recover_the_scale_of_the_losses():
    random = np.random.default_rng(0)
    scales = {0: 3.0, 1: 0.2, 2: 0.5, 4: 7.0}
    draws = {size: scale * 1.5 / random.gamma(1.5, size=4000) for size, scale in scales.items()}
    scores = [
        Score(draws[0][at], draws[4][at], None, tuple(PrefixScore(size, draws[size][at], None) for size in (1, 2)))
        for at in range(4000)
    ]
    found = estimate_errors(scores, SIZES, 1.5)
    assert found[:4] == pytest.approx([*scales.values()], rel=0.05)
    assert found[4] == 1.0, "no score has this size"


def test_losses_that_are_not_finite_are_left_out_of_the_errors():
    scores = [Score(loss, loss, None) for loss in (2.0, math.nan, math.inf, 8.0)]
    assert estimate_errors(scores, (5,)) == pytest.approx([4.0 * math.exp(float(digamma(1.0)))] * 2)
    assert estimate_errors([], (1, 5)) == [1.0, 1.0, 1.0]


def test_a_new_segmenter_is_built_after_each_processed_segment():
    lengths = iter([3, 5, 2])
    events = []

    def renew():
        events.append("renew")
        length = next(lengths)
        return Segmenter(lambda: 0, lambda met, x, y: met + 1, lambda met: length if met == length else None)

    samples = [(torch.zeros(1), torch.zeros(1))] * 10
    for segment in segment_adaptively(renew, samples, 100):
        events += [segment.end]
    assert events == ["renew", 3, "renew", 8, "renew", 10]


def test_an_empty_window_of_scores_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        play(leader(), draw_lines(0, [5]), window=0)
