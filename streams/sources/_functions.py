"""Families of functions of one variable whose samples are few-shot regression tasks, x uniform in -5 .. 5."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.types import Batch, Task
from streams.spec import TaskSpec

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
