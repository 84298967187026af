"""Score a task before it is learned, and the order that makes such a score honest."""

from collections.abc import Callable, Sequence

import torch

from online_meta.functional.model import evaluation_loss
from online_meta.inner import Inner, effective_params
from online_meta.types import AccuracyFn, Batch, Meta, PrefixScore, Score, Task


class OrderError(RuntimeError):
    """A task was learned that had not been scored: its score could have seen it."""


def score_task(
    inner: Inner, meta: Meta, task: Task, accuracy: AccuracyFn | None = None, prefixes: Sequence[int] = ()
) -> Score:
    """Return the query losses f(w) and f(U(w)), U adapting on the support set, and the accuracy after it.

    For each of ``prefixes``, in points and shorter than the support set, U adapts on its first so many points, too.
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
    """Return the task with the first so many points of its support set alone."""
    return Task(Batch(task.support.x[:points], task.support.y[:points]), task.query)


def score_learning_curve(score_fn: Callable[[Task], Score], task: Task, prefixes: Sequence[int]) -> Score:
    """Return what ``score_fn`` says of the task, and of it with each of ``prefixes`` as all of its support set."""
    scored = [(points, score_fn(truncate_support(task, points))) for points in prefixes if points < len(task.support.x)]
    shorter = tuple(PrefixScore(points, score.loss_after, score.accuracy) for points, score in scored)
    return score_fn(task)._replace(prefixes=shorter)


def points_needed(score: Score, size: int, proficiency: float) -> int | None:
    """Return how many points of its support set a learner needed to reach a ``proficiency``; None: all are too few.

    The learning efficiency of Finn et al. (ICML 2019, section 5), among the prefixes that were scored and the whole
    support set of ``size`` points. The proficiency is an accuracy to reach, or, without accuracies, a loss to come down
    to.
    """
    whole = PrefixScore(size, score.loss_after, score.accuracy)
    for found in (*score.prefixes, whole):
        if found.loss <= proficiency if found.accuracy is None else found.accuracy >= proficiency:
            return found.points
    return None


class ScoredTasks:
    """The tasks that have been scored and not yet learned, in order."""

    def __init__(self) -> None:
        """Begin with none."""
        self._tasks: list[Task] = []

    def add(self, task: Task) -> int:
        """Note that ``task`` is scored (twice in a row counts once); return how many stand before it."""
        if not (self._tasks and self._tasks[-1] is task):
            self._tasks.append(task)
        return len(self._tasks) - 1

    def check_none(self) -> None:
        """Raise ``OrderError`` when a task was scored that is not learned: its score could not be repeated."""
        if self._tasks:
            raise OrderError(f"{len(self._tasks)} task(s) were scored and not learned: learn() comes first")

    def take(self, tasks: Sequence[Task]) -> None:
        """Check that ``tasks`` are all the scored ones in their order, and forget them.

        Raises ``OrderError`` when a task was not scored first, or scored ones are left out.
        """
        same = len(tasks) == len(self._tasks) and all(a is b for a, b in zip(tasks, self._tasks, strict=True))
        if not same or not tasks:
            raise OrderError(
                f"learn() was given {len(tasks)} task(s), score() saw {len(self._tasks)}: every task is scored "
                "before it is learned, and learn() takes the scored tasks in their order"
            )
        self._tasks.clear()
