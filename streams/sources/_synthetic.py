"""Generate synthetic tasks: a source whose task t is a pure function of t, and the parts of regression streams."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.replay import generator
from online_meta.types import Batch, Task
from streams.formats.wire import encode
from streams.spec import TaskSpec
from streams.types import Arrival

SPEC = TaskSpec(x_shape=(1,), y="real", y_shape=(1,))


Reals = NDArray[np.float64]


class Family(NamedTuple):
    """A family of functions ``value(parameters, x)``; each parameter is uniform in its ``low`` .. ``high``."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    value: Callable[[Reals, Reals], Any]

    def parameters(self, shares: Reals) -> Reals:
        """Return the parameters at relative positions 0 .. 1 in their ranges; surplus ``shares`` are ignored."""
        low, high = np.array(self.low), np.array(self.high)
        return np.asarray(low + shares[: len(low)] * (high - low))


FAMILIES = {
    "sinusoid": Family((0.1, 0.0), (5.0, math.pi), lambda p, x: p[0] * np.sin(x - p[1])),
    "line": Family((-3.0, -3.0), (3.0, 3.0), lambda p, x: p[0] * x + p[1]),
    "quadratic": Family((-0.2, -2.0, -3.0), (0.2, 2.0, 3.0), lambda p, x: p[0] * x**2 + p[1] * x + p[2]),
    "cubic": Family(
        (-0.1, -0.2, -2.0, -3.0), (0.1, 0.2, 2.0, 3.0), lambda p, x: p[0] * x**3 + p[1] * x**2 + p[2] * x + p[3]
    ),
    "sawtooth": Family((0.1, 0.0), (5.0, 1.0), lambda p, x: p[0] * (2 * np.mod(x / math.pi - p[1], 1.0) - 1)),
}
"""The sinusoids of Finn et al., ICML 2017; the polynomials of Yao et al., ICML 2019; sawtooths of period pi."""


MAX_PARAMETERS = max(len(family.low) for family in FAMILIES.values())


def sample_task(
    function: Callable[[Reals], Reals],
    random: np.random.Generator,
    support: int,
    query: int,
    noise: float,
    freedom: float = math.inf,
) -> Task:
    """Sample a task y = function(x) + noise * e with x uniform in -5 .. 5.

    Args:
        function: maps x of shape (n, 1) to y of the same shape.
        random: the generator of x and of the noise e.
        support: the number of support samples.
        query: the number of query samples.
        noise: the factor of the noise.
        freedom: the degrees of freedom of Student's t distribution of e; if infinite, e is standard normal.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    x = random.uniform(-5.0, 5.0, (support + query, 1))
    e = random.standard_normal(x.shape) if math.isinf(freedom) else random.standard_t(freedom, x.shape)
    xs, ys = (torch.from_numpy(values.astype(np.float32)) for values in (x, function(x) + noise * e))
    return Task(Batch(xs[:support], ys[:support]), Batch(xs[support:], ys[support:]))


def random_walk(*key: int, t: int) -> float:
    """Return W(t) of a Gaussian random walk with W(0) = 0 and independent increments of distribution N(0, 1).

    This is a pure function that needs O(log t) draws: W is drawn at powers of two, then at midpoints given both ends,
    where it is N((W(a) + W(b)) / 2, (b - a) / 4) (Levy's construction of Brownian motion, 1948).

    Args:
        key: seeds of the walk.
        t: the time, 0 or more.
    """
    if t == 0:
        return 0.0
    low, high, left, right = 0, 1, 0.0, _normal(key, 1)
    while high < t:
        low, left = high, right
        high *= 2
        right = left + math.sqrt(high - low) * _normal(key, high)
    while high > t:
        middle = (low + high) // 2
        value = (left + right) / 2 + math.sqrt((high - low) / 4) * _normal(key, middle)
        low, left, high, right = (low, left, middle, value) if t <= middle else (middle, value, high, right)
    return right


def _normal(key: tuple[int, ...], time: int) -> float:
    return float(generator(*key, time).standard_normal())


def reflect(value: float) -> float:
    """Fold ``value`` into 0 .. 1 by reflection at 0 and 1, so that short steps of a walk stay short."""
    rest = value % 2.0
    return min(rest, 2.0 - rest)


class SyntheticSource(NamedTuple):
    """A ``TaskSource`` that generates its tasks; the cursor is the number of the last task.

    Attributes:
        make: a pure function that returns task t.
        name: the name of the source; ids are "<name>-<t>".
        tasks: the number of tasks; None for an endless stream.
        per_second: the largest rate of tasks per second, from the start of reading; None for no limit.
        clock: a monotonic clock in seconds.
    """

    make: Callable[[int], Task]
    name: str
    tasks: int | None = None
    per_second: float | None = None
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks after a position, None while the next one is not due, and only None at the end.

        Raises:
            ValueError: if ``after`` is not a position of this source.
        """
        if after is not None and not (after.isascii() and after.isdigit()):
            raise ValueError(f"{self.name}: the position {after!r} is not a task number")
        first = 0 if after is None else int(after) + 1
        began = self.clock()
        t = first
        while True:
            due = self.per_second is None or self.clock() - began >= (t - first) / self.per_second
            if not due or (self.tasks is not None and t >= self.tasks):
                yield None
                continue
            yield Arrival(f"{self.name}-{t}", encode(self.make(t)), self.name, str(t))
            t += 1
