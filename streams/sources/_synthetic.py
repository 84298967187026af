"""A source whose task t is a pure function of t, so that its position is just a number."""

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
    """Functions ``value(parameters, x)``, each parameter uniform in its ``low`` .. ``high``."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    value: Callable[[Reals, Reals], Any]

    def parameters(self, shares: Reals) -> Reals:
        """Return the parameters that lie at these shares, 0 .. 1, of their ranges."""
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
    """Return a task of so many samples y = function(x) + noise * e, float32 tensors of shape (samples, 1).

    e is standard normal, or of Student's t distribution with so many degrees of ``freedom``, if that is finite.
    """
    x = random.uniform(-5.0, 5.0, (support + query, 1))
    e = random.standard_normal(x.shape) if math.isinf(freedom) else random.standard_t(freedom, x.shape)
    xs, ys = (torch.from_numpy(values.astype(np.float32)) for values in (x, function(x) + noise * e))
    return Task(Batch(xs[:support], ys[:support]), Batch(xs[support:], ys[support:]))


def random_walk(*key: int, t: int) -> float:
    """Return W(t) of the walk called ``key``: W(0) = 0, independent increments of normal distribution N(0, 1).

    It is a pure function, in O(log t) draws: W at the powers of two first, then at midpoints given both ends, which are
    N((W(a) + W(b)) / 2, (b - a) / 4) (the construction of Brownian motion by Levy, 1948).
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
    """Return where ``value`` is when 0 and 1 are mirrors: in 0 .. 1, and as far as before from a step so short."""
    rest = value % 2.0
    return min(rest, 2.0 - rest)


class SyntheticSource(NamedTuple):
    """A ``TaskSource`` that makes its tasks; the cursor is the number of the last one.

    Attributes:
        make: task t, a pure function.
        name: of the source; ids are "<name>-<t>".
        tasks: how many there are; None: without end.
        per_second: how many at most, counted from when it is read; None: as fast as it is read.
        clock: seconds, never backwards.
    """

    make: Callable[[int], Task]
    name: str
    tasks: int | None = None
    per_second: float | None = None
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks behind ``after``, None while the next one is not due, and None for ever at the end.

        Raises:
            ValueError: if ``after`` is not a position that this source gave.
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
