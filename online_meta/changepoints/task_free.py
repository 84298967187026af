"""Play a task-free stream online: segment it by the leader's losses, score each segment, then learn it."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.changepoints.leader_likelihood import ADAPTATION_SIZES, leader_likelihood
from online_meta.changepoints.segments import Likelihood, Segmenter, TaskSegment, segment_adaptively
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.types import Batch, Belief, Score, Task

Samples = Sequence[tuple[Tensor, Tensor]]
"""Samples (x, y), each without a batch dimension, in stream order."""


class PlayedSegment(NamedTuple):
    """A segment of a stream and its score before it was learned; None if it is too short to be a task."""

    segment: TaskSegment
    score: Score | None


def play_task_free(
    learner: FollowTheMetaLeader,
    segmenter: Callable[[Likelihood], Segmenter],
    samples: Samples,
    *,
    sizes: Sequence[int] = ADAPTATION_SIZES,
    squared_error: bool = True,
    window: int = 20,
    shape: float = 1.0,
    max_samples: int = 1_000,
) -> Iterator[PlayedSegment]:
    """Play a stream without task boundaries; yield its segments with their scores.

    As in MOCA (Harrison et al., NeurIPS 2020), a change is detected where the samples become improbable under the
    leader, adapted to the samples since the last change. MOCA trains through its belief about the change; here each
    segment becomes a task, which is scored and then learned, as in Follow-the-Meta-Leader (Finn et al., ICML 2019). The
    updated leader segments the rest of the stream. The learner may start untrained.

    Args:
        learner: scores and learns the tasks; its leader segments the stream.
        segmenter: makes a segmenter from a likelihood, e.g. ``partial(run_length, hazard=0.02, least=10)``.
        samples: the stream.
        sizes: the run lengths at which the leader adapts, in samples; see ``leader_likelihood`` and ``make_task``.
        squared_error: whether the loss is a mean square error, whose scale ``estimate_errors`` takes from the newest
            scores; if false, it is a negative log-likelihood such as cross-entropy.
        window: the number of newest scores to use, at least 1.
        shape: shape of the prior of the error variance, above 0; a smaller one lets tasks differ more.
        max_samples: the maximum length of a segment, at least 1.

    Yields:
        Each segment, after it was learned.

    Raises:
        ValueError: if an option is out of its range.
    """
    if window < 1:
        raise ValueError(f"window is {window}; errors are estimated from at least 1 score")
    scores: deque[Score] = deque(maxlen=window)

    def make_segmenter() -> Segmenter:
        errors = estimate_errors(scores, sizes, shape) if squared_error else None
        state = learner.state()

        def believe(support: Batch) -> Belief:
            return learner.believe(state, support)[""]

        loss = learner.inner.loss
        return segmenter(leader_likelihood(believe, loss, *samples[0], sizes=sizes, errors=errors, shape=shape))

    for segment in segment_adaptively(make_segmenter, samples, max_samples):
        task = make_task(samples[segment.begin : segment.end], sizes)
        if task is None:
            yield PlayedSegment(segment, None)
            continue
        scores.append(learner.score(task, sizes))
        learner.learn(task)
        yield PlayedSegment(segment, scores[-1])


def make_task(samples: Samples, sizes: Sequence[int] = ADAPTATION_SIZES) -> Task | None:
    """Make a task of a segment; return None if it has fewer than twice the smallest of ``sizes`` samples.

    With n the largest of ``sizes`` that is at most half the segment, the first n samples are the support set and the
    next n the query set. So the leader learns to adapt to the numbers of samples that the likelihood uses, tasks have
    few different shapes, and the last samples of a long segment are unused: if its end was detected late, they may
    belong to the next task.
    """
    size = max((size for size in sizes if 2 * size <= len(samples)), default=0)
    if not size:
        return None
    x, y = (torch.stack([sample[half] for sample in samples[: 2 * size]]) for half in (0, 1))
    return Task(Batch(x[:size], y[:size]), Batch(x[size:], y[size:]))


def estimate_errors(
    scores: Sequence[Score], sizes: Sequence[int] = ADAPTATION_SIZES, shape: float = 1.0
) -> list[float]:
    """Return the expected mean square errors for 0 samples and each of ``sizes``, for ``leader_likelihood``.

    They come from tasks that had not been learned when they were scored. If the errors of tasks are s v with v ~
    InverseGamma(shape, shape), then E log(s v) = log s + log shape - digamma(shape), which is solved for s. Unlike the
    mean, this estimate is robust against a few tasks on which adaptation diverged. Without a usable score, s is 1;
    targets should have a magnitude of about 1, as for the conjugate likelihoods.

    Args:
        scores: scores of tasks from ``make_task``, with the prefixes ``sizes`` of their support sets.
        sizes: the numbers of samples adapted to, in ascending order.
        shape: shape of the prior in ``leader_likelihood``, above 0.
    """
    losses_by_size: list[dict[int, float]] = []
    for score in scores:
        prefixes = {prefix.points: prefix.loss for prefix in score.prefixes}
        (whole, *_) = (size for size in sizes if size not in prefixes)
        losses_by_size.append({0: score.loss_before, **prefixes, whole: score.loss_after})
    correction = float(torch.digamma(torch.tensor(shape, dtype=torch.float64))) - math.log(shape)
    found = []
    for size in (0, *sizes):
        losses = [losses[size] for losses in losses_by_size if size in losses]
        logs = [math.log(loss) for loss in losses if 0 < loss < math.inf]
        found.append(math.exp(sum(logs) / len(logs) + correction) if logs else 1.0)
    return found
