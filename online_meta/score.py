"""Score a task before it is learned, and the order that makes such a score honest."""

from collections.abc import Sequence

import torch

from online_meta.functional import judged
from online_meta.inner import Inner, see
from online_meta.types import AccuracyFn, Meta, Score, Task


class OrderError(RuntimeError):
    """A task was learned that had not been scored: its score could have seen it."""


def score_task(inner: Inner, meta: Meta, task: Task, accuracy: AccuracyFn | None = None) -> Score:
    """Return the query losses f(w) and f(U(w)), U adapting on the support set, and the accuracy after it."""
    loss = judged(inner.loss)
    with torch.no_grad():
        before = loss(see(inner, meta, {}), task.query)
        adapted = inner.adapt(meta, task.support)
        after = loss(adapted, task.query)
        right = None if accuracy is None else float(accuracy(adapted, task.query))
        return Score(float(before), float(after), right)


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
