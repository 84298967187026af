"""Draw some samples of a task that is revisited, so that a large task costs a meta-step no more than a small one."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.batches import count_samples, first_tensor, select_samples
from online_meta.functional.classes import IGNORED_CLASS
from online_meta.replay import generator, sample_systematically, sample_uniformly
from online_meta.types import Batch, Task

DRAW = 0x7A5D
"""Begins the keys of these draws, which sets them apart from those of rounds."""


class Tasks(Protocol):
    """The tasks of past rounds."""

    def __getitem__(self, round: int, /) -> Task:
        """Return the task of a round."""

    def gather(self, rounds: Sequence[int]) -> Sequence[Task]:
        """Return the tasks of rounds, in their order."""


class TaskDraw(NamedTuple):
    """How many samples of a task are drawn, without replacement, each time that a meta-step revisits it.

    The loss of a batch is a mean over its rows, so that of the drawn query rows is unbiased: the expected meta-gradient
    is that of the mean loss on all query rows, after adapting to as many drawn support rows. Rows of weight 0 and of
    class -100 are not drawn. If weights differ, the expected number of draws of a row is in proportion to its weight,
    and a row can be drawn more than once (systematic sampling; Madow, 1949).

    Attributes:
        support: the number of support samples, at least 1; None for all. A smaller set is taken as it is.
        query: the number of query samples, at least 1; None for all.
        weighs: whether each drawn row has the weight of those that it stands for, as is needed where support and query
            are joined.
    """

    support: int | None = None
    query: int | None = None
    weighs: bool = False

    def draw(self, task: Task, *key: int) -> Task:
        """Return a task of the drawn samples, in their order, as a function of the task and integers of at least 0."""
        if self.support is None and self.query is None:
            return task
        support, query = (
            self._draw_batch(batch, count, generator(DRAW, place, *key))
            for place, (batch, count) in enumerate(zip(task, (self.support, self.query), strict=True))
        )
        return Task(support, query)

    def _draw_batch(self, batch: Batch, count: int | None, random: np.random.Generator) -> Batch:
        if count is None or count_samples(batch) <= count:
            return batch
        weight = _weights_of(batch)
        total = float(weight.sum())
        if total <= 0:  # Nothing counts, so that it does not matter what is drawn.
            return select_samples(batch, slice(0, count))
        found = select_samples(batch, torch.from_numpy(_draw_rows(weight, count, random)))
        if batch.weight is None and not self.weighs:
            return found
        like = first_tensor(batch.x) if batch.weight is None else batch.weight
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return found._replace(weight=like.new_full((count,), total / count, dtype=dtype))


def _weights_of(batch: Batch) -> NDArray[np.float64]:
    """Return how much each row counts."""
    weight = torch.ones(count_samples(batch)) if batch.weight is None else batch.weight.detach().cpu()
    y = batch.y
    if isinstance(y, torch.Tensor) and y.ndim == 1 and not y.is_floating_point():
        weight = weight * (y.cpu() != IGNORED_CLASS)
    found: NDArray[np.float64] = weight.double().numpy()
    return found


def _draw_rows(weight: NDArray[np.float64], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return the positions of ``count`` rows in ascending order."""
    counted = np.flatnonzero(weight)
    if len(counted) >= count and bool((weight[counted] == weight[counted[0]]).all()):
        return np.sort(np.array(sample_uniformly(counted, count, random), np.int64))
    hits = sample_systematically(weight, count, random)
    return np.repeat(*np.array(sorted(hits), np.int64).T)


ALL_SAMPLES = TaskDraw()
"""Draws nothing: every task is taken as it is."""


class DrawnTasks:
    """The tasks of past rounds as one meta-step sees them: a function of the seed, the newest round and the step."""

    def __init__(self, draw: TaskDraw, tasks: Tasks, seed: int, round: int, step: int) -> None:
        """Take the tasks, and what identifies the draws."""
        self._draw, self._tasks, self._key = draw, tasks, (seed, round, step)

    def __getitem__(self, round: int, /) -> Task:
        """Return the drawn samples of a round's task."""
        return self._draw.draw(self._tasks[round], *self._key, round)

    def gather(self, rounds: Sequence[int]) -> Sequence[Task]:
        """Return the drawn samples of the tasks of rounds."""
        draws_all = self._draw.support is None and self._draw.query is None
        return self._tasks.gather(rounds) if draws_all else [self[round] for round in rounds]
