"""Score tasks, and enforce that each task is scored before it is learned."""

from collections.abc import Sequence

import torch

from online_meta.answers import Answers, answer_by_inner_loop
from online_meta.batches import count_samples, empty_like, first_tensor, select_samples
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.double_backward import math_attention
from online_meta.inner import Inner
from online_meta.prediction import accuracy_of_prediction, loss_of, nll_of
from online_meta.regret.calibration import count_calibration
from online_meta.types import Calibration, Meta, Prediction, PrefixScore, Score, State, Task


class OrderError(RuntimeError):
    """Tasks were learned and scored in the wrong order, so a score could depend on its own task."""


@outside_inference_mode
def score_answers(answers: Answers, state: State, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
    """Score what a learner answers to a task: the losses of its predictions of the query set.

    The loss before adaptation is that of the answer to an empty support set.

    Args:
        answers: the learner's answers.
        state: what it has published.
        task: the task.
        prefixes: numbers of first support samples to answer from as well; those not below the support size are ignored.

    Returns:
        A score for each answer, by its suffix.
    """
    support, query = task
    size = count_samples(support)
    shorter = [points for points in prefixes if points < size]
    with torch.no_grad(), math_attention():  # To select the kernel at each call of the model is slower.
        before = answers(state, empty_like(support), query.x)
        whole = answers(state, support, query.x)
        parts = [answers(state, select_samples(support, slice(points)), query.x) for points in shorter]
        scores = {}
        for suffix, prediction in whole.items():
            calibration = count_calibration(prediction, query.y, query.weight)
            prefix_scores = (
                PrefixScore(points, _loss(part[suffix], task), _accuracy(part[suffix], task))
                for points, part in zip(shorter, parts, strict=True)
            )
            scores[suffix] = Score(
                _loss(before[suffix], task),
                _loss(prediction, task),
                _accuracy(prediction, task, calibration),
                tuple(prefix_scores),
                _nll(prediction, task),
                calibration,
            )
        return scores


def _loss(prediction: Prediction, task: Task) -> float:
    return float(loss_of(prediction, task.query.y, task.query.weight))


def _accuracy(prediction: Prediction, task: Task, calibration: Calibration | None = None) -> float | None:
    """Return the accuracy; None for an outcome without classes. The counts of ``calibration`` save its computation."""
    if any(component.outcome.probabilities is None for component in prediction):
        return None
    samples = 0 if calibration is None or task.query.weight is not None else sum(calibration.samples)
    if calibration is not None and samples and samples == first_tensor(task.query.y).numel():
        return sum(calibration.correct) / samples
    return float(accuracy_of_prediction(prediction, task.query.y, weight=task.query.weight))


def _nll(prediction: Prediction, task: Task) -> float | None:
    """Return the mean negative log-likelihood of the rows; None for an outcome that is no distribution."""
    for outcome in (component.outcome for component in prediction):
        if outcome.loss is not None and outcome.cdf is None and outcome.probabilities is None:
            return None
    rows, weight = nll_of(prediction, task.query.y), task.query.weight
    return float(rows.mean() if weight is None else (weight * rows).sum() / weight.sum())


def score_task(inner: Inner, meta: Meta, task: Task, prefixes: Sequence[int] = ()) -> Score:
    """Return the query losses f(w) and f(U(w)) before and after adapting meta-parameters w with the inner loop U."""
    answers: Answers = lambda state, support, x: answer_by_inner_loop(inner, meta, support, x)  # noqa: E731
    return score_answers(answers, {}, task, prefixes)[""]


def truncate_support(task: Task, points: int) -> Task:
    """Return the task with only the first ``points`` samples of its support set."""
    return task._replace(support=select_samples(task.support, slice(points)))


def points_needed(score: Score, size: int, proficiency: float) -> int | None:
    """Return the smallest scored number of support samples that reaches ``proficiency``; None if none does.

    This is the learning efficiency of Finn et al. (ICML 2019, section 5), among the scored prefixes and the whole
    support set of ``size`` samples. The proficiency is a minimum accuracy, or, without accuracies, a maximum loss.
    """
    whole = PrefixScore(size, score.loss_after, score.accuracy)
    for found in (*score.prefixes, whole):
        if found.loss <= proficiency if found.accuracy is None else found.accuracy >= proficiency:
            return found.points
    return None


class ScoredTasks:
    """The queue of tasks that have been scored but not yet learned."""

    def __init__(self) -> None:
        """Start with no tasks."""
        self._tasks: list[Task] = []

    def add(self, task: Task) -> int:
        """Add a scored ``task`` (twice in a row counts once); return the number of tasks before it."""
        if not (self._tasks and self._tasks[-1] is task):
            self._tasks.append(task)
        return len(self._tasks) - 1

    def check_none(self) -> None:
        """Raise ``OrderError`` if a scored task has not been learned: its score could not be reproduced."""
        if self._tasks:
            raise OrderError(f"{len(self._tasks)} task(s) were scored but not learned: call learn() first")

    def take(self, tasks: Sequence[Task]) -> None:
        """Check that ``tasks`` are all scored tasks in their order, and clear the queue.

        Raises ``OrderError`` if a task was not scored, a scored one is missing, or there are none.
        """
        same = len(tasks) == len(self._tasks) and all(a is b for a, b in zip(tasks, self._tasks, strict=True))
        if not same or not tasks:
            raise OrderError(
                f"learn() got {len(tasks)} task(s), but {len(self._tasks)} are scored: score every task before "
                "learning it, and pass all scored tasks to learn() in their order"
            )
        self._tasks.clear()
