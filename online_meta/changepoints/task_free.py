"""A stream without task boundaries, played online: cut by what the leader loses, each segment scored, then learned."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.changepoints.leader_likelihood import ADAPTATION_SIZES, leader_likelihood
from online_meta.changepoints.segments import Likelihood, Segmenter, TaskSegment, segment_adaptively
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.types import Batch, Score, Task

Samples = Sequence[tuple[Tensor, Tensor]]
"""Samples (x, y), each without a leading dimension, in the order in which they come."""


class PlayedSegment(NamedTuple):
    """A segment of a stream, and how it was scored before it was learned; None where it is too short to be a task."""

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
    """Play a stream that nobody has cut into tasks, by a leader that may start from nothing; yield its segments.

    As MOCA does (Harrison et al., NeurIPS 2020), the task changed where the samples become improbable under the leader,
    adapted to those since the last change. MOCA trains through its belief of where that was; here each segment that is
    cut becomes a task, is scored, then learned, as in Follow-the-Meta-Leader (Finn et al., ICML 2019), and the next is
    cut by the leader as it is then.

    Args:
        learner: any that follows its leader; it is scored and learned with.
        segmenter: of a likelihood, such as ``partial(run_length, hazard=0.02, least=10)``.
        samples: the stream.
        sizes: of how many samples of a run the leader adapts, as for ``leader_likelihood`` and ``make_task``.
        squared_error: whether the loss is a mean square error, whose scale is taken from the newest scores by
            ``estimate_errors``; if not, it is a negative log-likelihood, such as cross-entropy.
        window: how many scores.
        shape: the smaller, the more tasks differ in how hard they are.
        max_samples: a segment is cut at so many samples, whatever is found.

    Raises:
        ValueError: if an option is out of its range.
    """
    if window < 1:
        raise ValueError(f"window is {window}: errors are expected from 1 score or more")
    scores: deque[Score] = deque(maxlen=window)

    def make_segmenter() -> Segmenter:
        errors = estimate_errors(scores, sizes, shape) if squared_error else None
        meta = learner.engine.meta()
        return segmenter(leader_likelihood(learner.inner, meta, *samples[0], sizes=sizes, errors=errors, shape=shape))

    for segment in segment_adaptively(make_segmenter, samples, max_samples):
        task = make_task(samples[segment.begin : segment.end], sizes)
        if task is None:
            yield PlayedSegment(segment, None)
            continue
        scores.append(learner.score(task, sizes))
        learner.learn(task)
        yield PlayedSegment(segment, scores[-1])


def make_task(samples: Samples, sizes: Sequence[int] = ADAPTATION_SIZES) -> Task | None:
    """Return the task of a segment; None where it has fewer samples than two of the least of ``sizes``.

    The first samples are its support, in number the largest of ``sizes`` that is at most half of them; as many behind
    them are its query. So the leader learns to adapt to what it will judge by; the last samples of a long segment,
    which may be of the next task where its end was told too late, are of neither; and tasks have few different shapes.
    """
    size = max((size for size in sizes if 2 * size <= len(samples)), default=0)
    if not size:
        return None
    x, y = (torch.stack([sample[half] for sample in samples[: 2 * size]]) for half in (0, 1))
    return Task(Batch(x[:size], y[:size]), Batch(x[size:], y[size:]))


def estimate_errors(
    scores: Sequence[Score], sizes: Sequence[int] = ADAPTATION_SIZES, shape: float = 1.0
) -> list[float]:
    """Return the mean square errors to expect of no sample, and of each of ``sizes``, for ``leader_likelihood``.

    They are those of tasks that had not been learned when they were scored. If the errors of tasks are s v, v ~
    InverseGamma(shape, shape), then E log(s v) = log s + log shape - digamma(shape), from which s follows; unlike the
    mean, it is not moved far by a few tasks on which adapting went astray. Where no score says anything, it is 1:
    targets are to be of about unit size, as for the conjugate likelihoods.

    Args:
        scores: of tasks by ``make_task``, with the prefixes ``sizes`` of their support.
        sizes: of how many samples.
        shape: of the prior in ``leader_likelihood``.
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
