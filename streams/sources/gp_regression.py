"""Generate functions of a Gaussian process with noise, the benchmark of neural processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from online_meta.replay import generator
from online_meta.types import Batch, Prediction, Task, Tensors
from streams.sources import Oracle
from streams.sources._exact import predict_normal, read_samples, require_noise
from streams.sources._synthetic import SPEC, SyntheticSource
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "make_task", "oracle"]


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "gp_regression"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the largest number of support samples per task.
        least_support: the smallest number; each task draws its own. With that of ``support``, all have the same.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
        kernel: the covariance of the functions: "eq" is the exponentiated quadratic, "matern52" has two derivatives,
            "periodic" repeats.
        length_scale: the distance in x over which functions change; for "periodic", a factor without unit.
        amplitude: the standard deviation of a function at each x.
        period: the period of "periodic", in units of x.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    least_support: Annotated[int, Ge(1)] = 3
    query: Annotated[int, Ge(1)] = 20
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Gt(0)] = 0.1
    kernel: Literal["eq", "matern52", "periodic"] = "eq"
    length_scale: Annotated[float, Gt(0)] = 0.5
    amplitude: Annotated[float, Gt(0)] = 1.0
    period: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        """Refuse a least number of support samples above the largest, and too little noise."""
        if self.least_support > self.support:
            raise ValueError(f"least_support is {self.least_support}: it must be at most support, {self.support}")
        require_noise(self.noise, self.amplitude)


KERNELS: dict[str, Callable[[Tensor, Settings], Tensor]] = {
    "eq": lambda r, of: torch.exp(-0.5 * (r / of.length_scale) ** 2),
    "matern52": lambda r, of: _matern52(math.sqrt(5) * r / of.length_scale),
    "periodic": lambda r, of: torch.exp(-2 * (torch.sin(math.pi * r / of.period) / of.length_scale) ** 2),
}
"""Correlations at distances r >= 0 (Rasmussen and Williams, 2006, section 4.2)."""


def _matern52(r: Tensor) -> Tensor:
    return (1 + r + r**2 / 3) * torch.exp(-r)


def _covariance(x: Tensor, settings: Settings) -> Tensor:
    """Return the covariance matrix (n, n) of a function at x (n, 1)."""
    return settings.amplitude**2 * KERNELS[settings.kernel]((x - x.T).abs(), settings)


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "gp_regression")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments; x is uniform in -2 .. 2.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random = generator(seed, t)
    support = int(random.integers(settings.least_support, settings.support + 1))
    x = torch.from_numpy(random.uniform(-2.0, 2.0, (support + settings.query, 1)))
    covariance = _covariance(x, settings) + settings.noise**2 * torch.eye(len(x), dtype=x.dtype)
    y = torch.linalg.cholesky(covariance) @ torch.from_numpy(random.standard_normal(x.shape))
    xs, ys = x.float(), y.float()
    return Task(*(Batch(xs[part], ys[part]) for part in (slice(support), slice(support, None))))


def oracle(settings: Settings) -> Oracle:
    """Return the exact Bayes predictor: the posterior of the Gaussian process."""

    def predict(support: Batch, x: Tensors) -> Prediction:
        seen, y, asked = read_samples(support, x, 1)
        points = torch.cat([seen, asked])
        return predict_normal(torch.zeros_like(points[:, 0]), _covariance(points, settings), y, settings.noise)

    return predict
