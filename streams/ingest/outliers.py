"""Refuse outliers: tasks whose numbers are far larger than those that their source brought before.

One finite task with targets of 1e6, or with a Unix time as target, is valid, and still it ruins every mean loss that
contains it. A source with ``outliers = "quarantine"`` refuses such a task. The bound is a function of the tasks of the
source that were committed before, in their order; their scales are committed with them. So a restart changes nothing.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from online_meta.batches import as_named, select_samples
from online_meta.types import Task
from streams.types import Receipt, Rejected, Scales

OutlierRule = Literal["accept", "quarantine"]
"""What a source does with outliers."""

WINDOW = 500
"""How many of the newest tasks of a source decide on the next one."""

MINIMUM = 30
"""How many tasks a source must have brought before one is refused."""

DEVIATIONS = 6.0
"""How far above the median an outlier is: standard deviations of the logarithms, as estimated from their MAD."""

LEAST_RATIO = 10.0
"""How many times larger than the median an outlier is at least."""

NORMAL_MAD = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation (MAD)."""

_PARTS = {"inputs": "x", "targets": "y"}


def measure_scales(task: Task) -> Scales:
    """Return the root mean square of a task's inputs and of its targets, over its support and query set together.

    Several inputs or targets have one scale, that of all their numbers. Samples of weight 0 are left out. Integers
    (pixels, tokens, labels) and sets of zeros have no scale; then it is None.
    """
    counted = [batch if batch.weight is None else select_samples(batch, batch.weight > 0) for batch in task]
    x = [one for batch in counted for one in as_named(batch.x).values()]
    y = [one for batch in counted for one in as_named(batch.y).values()]
    return Scales(_scale(x), _scale(y))


def _scale(tensors: list[Tensor]) -> float | None:
    numbers = [tensor for tensor in tensors if tensor.dtype.is_floating_point]
    if not numbers:
        return None
    values = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in numbers])
    largest = float(values.abs().max())
    if largest == 0:
        return None
    return largest * math.sqrt(float((values / largest).square().mean()))  # a square may exceed the range of float64


class Bound(NamedTuple):
    """The largest scale that is accepted: exp(median + max(6 * 1.4826 * MAD, ln 10)), of logarithms of scales.

    Attributes:
        largest: the bound.
        median: the median scale.
        deviation: the MAD of the logarithms of the scales.
        tasks: the number of scales.
    """

    largest: float
    median: float
    deviation: float
    tasks: int


def compute_bound(scales: Collection[float]) -> Bound | None:
    """Return the bound that follows from the ``scales`` of accepted tasks; None if there are fewer than ``MINIMUM``."""
    if len(scales) < MINIMUM:
        return None
    logarithms = np.log(np.fromiter(scales, np.float64, len(scales)))
    median = float(np.median(logarithms))
    deviation = float(np.median(np.abs(logarithms - median)))
    above = max(DEVIATIONS * NORMAL_MAD * deviation, math.log(LEAST_RATIO))
    largest = math.exp(min(median + above, math.log(np.finfo(np.float64).max)))
    return Bound(largest, math.exp(median), deviation, len(scales))


class OutlierFilter:
    """Decides which tasks of one source are outliers; thread-safe.

    Args:
        committed: the scales of the newest committed tasks of the source, oldest first.
    """

    def __init__(self, committed: Collection[Scales]) -> None:
        """Start with the committed scales."""
        self._committed = deque(committed, maxlen=WINDOW)
        self._queued: deque[Scales] = deque()
        self._lock = threading.Lock()
        self._order = threading.Lock()

    def submit(self, task: Task, put: Callable[[Scales], "Future[Any]"]) -> "Future[Any]":
        """Queue a task that is no outlier.

        Tasks are judged in the order in which they are queued, which is the order in which they are committed.

        Args:
            task: the task.
            put: queues the task with its scales; the result of its future is a ``Receipt`` if it was committed.

        Raises:
            Rejected: with the reason "outlier"; its evidence has the numbers.
        """
        scales = measure_scales(task)
        with self._order:
            self.check(scales)
            future = put(scales)
            with self._lock:
                self._queued.append(scales)
            future.add_done_callback(lambda done: self._settle(scales, done))
        return future

    def check(self, scales: Scales) -> None:
        """Raise ``Rejected`` if a task with these scales is an outlier."""
        with self._lock:
            known = [*self._committed, *self._queued][-WINDOW:]
        for part, field in _PARTS.items():
            scale = getattr(scales, field)
            bound = compute_bound([one for before in known if (one := getattr(before, field)) is not None])
            if scale is not None and bound is not None and scale > bound.largest:
                raise Rejected(
                    "outlier", _explain(part, scale, bound), {"part": part, "scale": scale, **bound._asdict()}
                )

    def _settle(self, scales: Scales, done: "Future[Any]") -> None:
        is_new = done.exception() is None and isinstance(done.result(), Receipt) and not done.result().duplicate
        with self._lock:
            if scales in self._queued:
                self._queued.remove(scales)
            if is_new:
                self._committed.append(scales)


def _explain(part: str, scale: float, bound: Bound) -> str:
    return (
        f"the root mean square of its {part} is {scale:.4g}; the bound is {bound.largest:.4g}: the last {bound.tasks} "
        f"tasks of this source have a median of {bound.median:.4g}, and their logarithms a MAD of {bound.deviation:.4g}"
    )
