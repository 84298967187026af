"""Try the model on each task before it is accepted, if that is cheap: its forward pass, on the CPU."""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from deploy.checks.model import make_synthetic_task
from deploy.config.config import Config
from online_meta.batches import map_tensors
from online_meta.batching.failures import describe_failure, is_task_failure
from online_meta.functional.model import ModelLoss
from online_meta.learners import LearnerContext
from online_meta.types import Batch, Params, Task
from streams.types import Rejected

REPEATS = 10
"""How often a forward pass is measured; the shortest time counts."""

MEASURE_SECONDS = 1.0
"""No further forward pass is measured after this time."""

LARGER = 16
"""How many times more samples the second measured task has, which shows what a sample costs."""

log = logging.getLogger(__name__)


class Cost(NamedTuple):
    """What a forward pass on a task costs: ``fixed`` seconds, and ``per_element`` seconds for each element of x."""

    fixed: float
    per_element: float

    def seconds(self, task: Task) -> float:
        """Return the expected seconds for a task."""
        return self.fixed + self.per_element * count_elements(task)


class TaskTrial:
    """Runs the model's forward pass and loss on a task; thread-safe, one task at a time.

    The initial weights are used: whether a task fits the model depends on its shapes and values. An exception that is
    not due to the task, such as a lack of memory, refuses nothing.

    Args:
        loss: the model's loss.
        weights: the weights, on the CPU.
        cost: what a trial costs.
        seconds: tasks that are expected to take longer are not tried.
    """

    def __init__(self, loss: ModelLoss, weights: Params, cost: Cost, seconds: float) -> None:
        """Take the model."""
        self._loss, self._weights = loss, weights
        self.cost, self._seconds = cost, seconds
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> None:
        """Try the support set and the query set.

        Raises:
            Rejected: with the reason "model_error", if the model raises an exception on one of them.
        """
        if self.cost.seconds(task) > self._seconds:
            return
        for name, batch in (("support", task.support), ("query", task.query)):
            try:
                with self._lock:
                    run_forward(self._loss, self._weights, batch)
            except BaseException as error:  # a user's model may raise anything, and must not end the thread
                if is_task_failure(error) or not isinstance(error, Exception):
                    detail = f"the model does not accept the {name} set: {describe_failure(error)}"
                    raise Rejected("model_error", detail) from error
                log.warning("a task was not tried with the model: %s", describe_failure(error))


def run_forward(loss: ModelLoss, weights: Params, batch: Batch) -> None:
    """Compute the loss of a batch in evaluation mode, without gradients."""
    with torch.no_grad():
        loss.evaluate(weights, batch)


def count_elements(task: Task) -> int:
    """Return the number of elements of the inputs of a task."""
    return sum(tensor.numel() for batch in task for tensor in tree_leaves(batch.x))


def make_trial(
    config: Config, context: LearnerContext, clock: Callable[[], float] = time.perf_counter
) -> TaskTrial | None:
    """Return the trial of tasks; None if it is switched off, too slow, or does not work on the CPU.

    The forward pass is measured on synthetic tasks of two sizes.

    Args:
        config: of the run.
        context: of the learners, with the model's loss and initial weights.
        clock: returns seconds.
    """
    assert isinstance(context.inner.loss, ModelLoss)
    if not config.serve.try_tasks:
        return None
    torch.set_num_threads(config.engine.threads)
    weights = {name: value.detach().cpu() for name, value in context.start.weights.items()}
    small = make_synthetic_task(config.task, torch.device("cpu"))
    try:
        fixed = _measure(context.inner.loss, weights, small, clock)
        if fixed > config.serve.try_seconds:
            limit = config.serve.try_seconds
            log.info("tasks are not tried when they arrive: that takes %.2g s; [serve] try_seconds is %g", fixed, limit)
            return None
        large = map_tensors(lambda tensor: torch.cat([tensor] * LARGER), small)
        more = _measure(context.inner.loss, weights, large, clock) - fixed
    except Exception as error:  # a user's model may raise anything
        log.warning("tasks are not tried when they arrive: the model fails on the CPU: %s", describe_failure(error))
        return None
    per_element = max(more, 0.0) / max(count_elements(large) - count_elements(small), 1)
    return TaskTrial(context.inner.loss, weights, Cost(fixed, per_element), config.serve.try_seconds)


def _measure(loss: ModelLoss, weights: Params, task: Task, clock: Callable[[], float]) -> float:
    """Return the seconds of a forward pass on a task; the first one is slower and counts only if it takes long."""
    times: list[float] = []
    while len(times) < 1 + REPEATS and sum(times) < MEASURE_SECONDS:
        began = clock()
        for batch in task:
            run_forward(loss, weights, batch)
        times.append(clock() - began)
    return min(times[1:] or times)
