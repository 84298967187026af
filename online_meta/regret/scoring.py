"""Score tasks, and enforce that each task is scored before it is learned."""

from collections.abc import Callable, Sequence

import torch

from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.model import evaluation_loss
from online_meta.inner import Inner, effective_params
from online_meta.types import AccuracyFn, Batch, Meta, PrefixScore, Score, Task


class OrderError(RuntimeError):
    """Tasks were learned and scored in the wrong order, so a score could depend on its own task."""


@outside_inference_mode
def score_task(
    inner: Inner, meta: Meta, task: Task, accuracy: AccuracyFn | None = None, prefixes: Sequence[int] = ()
) -> Score:
    """Return the query losses f(w) and f(U(w)) before and after adapting to the support set.

    Args:
        inner: the inner loop U.
        meta: the meta-parameters w.
        task: the task.
        accuracy: computes the accuracy after adaptation; None to leave it out.
        prefixes: numbers of first support samples to adapt to as well; those not below the support size are ignored.

    Returns:
        The score.
    """
    loss = evaluation_loss(inner.loss)

    def score_prefix(points: int) -> PrefixScore:
        phi = inner.adapt(meta, truncate_support(task, points).support)
        right = None if accuracy is None else float(accuracy(phi, task.query))
        return PrefixScore(points, float(loss(phi, task.query)), right)

    with torch.no_grad():
        size = len(task.support.x)
        before, whole = float(loss(effective_params(inner, meta, {}), task.query)), score_prefix(size)
        shorter = tuple(score_prefix(points) for points in prefixes if points < size)
        return Score(before, whole.loss, whole.accuracy, shorter)


def truncate_support(task: Task, points: int) -> Task:
    """Return the task with only the first ``points`` samples of its support set."""
    return Task(Batch(task.support.x[:points], task.support.y[:points]), task.query)


def score_learning_curve(score_fn: Callable[[Task], Score], task: Task, prefixes: Sequence[int]) -> Score:
    """Score the task with ``score_fn``, also with its support set truncated to each of ``prefixes``."""
    scored = [(points, score_fn(truncate_support(task, points))) for points in prefixes if points < len(task.support.x)]
    shorter = tuple(PrefixScore(points, score.loss_after, score.accuracy) for points, score in scored)
    return score_fn(task)._replace(prefixes=shorter)


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
