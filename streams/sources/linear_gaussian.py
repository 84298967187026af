"""Generate linear regression with normal coefficients, y = w x + b + noise, where exact answers have a closed form."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, MinLen

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
    """Options of ``[[source]] kind = "linear_gaussian"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
        mean: the mean of the coefficients of a task: one for each number of x, then the intercept.
        covariance: the covariance matrix of the coefficients, a list of its rows.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Gt(0)] = 0.3
    mean: Annotated[tuple[float, ...], MinLen(2)] = (0.0, 0.0)
    covariance: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (0.0, 1.0))

    def __post_init__(self) -> None:
        """Refuse a matrix that is no covariance of the coefficients."""
        size = len(self.mean)
        if [len(row) for row in self.covariance] != [size] * size:
            raise ValueError(f"covariance must have {size} rows of {size} numbers, for the {size} numbers of mean")
        matrix = np.array(self.covariance)
        if not (np.isfinite(matrix).all() and np.array_equal(matrix, matrix.T)):
            raise ValueError("covariance must be symmetric, and its numbers finite")
        if (least := np.linalg.eigvalsh(matrix).min()) < -1e-9 * np.abs(matrix).max():
            raise ValueError(f"covariance must have no negative eigenvalue, but has {least:.3g}")
        require_noise(self.noise, float(np.sqrt(matrix.diagonal().max())))


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, replace(SPEC, x_shape=(len(settings.mean) - 1,)), "linear_gaussian")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments; x is standard normal.

    Returns:
        A task of float32 tensors, x of shape (n, inputs) and y of shape (n, 1).
    """
    random = generator(seed, t)
    coefficients = random.multivariate_normal(settings.mean, settings.covariance, method="eigh")
    x = random.standard_normal((settings.support + settings.query, len(settings.mean) - 1))
    y = x @ coefficients[:-1, None] + coefficients[-1] + settings.noise * random.standard_normal((len(x), 1))
    xs, ys = (torch.from_numpy(values.astype(np.float32)) for values in (x, y))
    return Task(*(Batch(xs[part], ys[part]) for part in (slice(settings.support), slice(settings.support, None))))


def oracle(settings: Settings) -> Oracle:
    """Return the exact Bayes predictor: that of normal values with mean A m and covariance A S A^T, A = (x, 1)."""
    mean, covariance = (torch.tensor(one, dtype=torch.float64) for one in (settings.mean, settings.covariance))

    def predict(support: Batch, x: Tensors) -> Prediction:
        seen, y, asked = read_samples(support, x, len(mean) - 1)
        columns = torch.cat([seen, asked])
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1)
        return predict_normal(columns @ mean, columns @ covariance @ columns.T, y, settings.noise)

    return predict
