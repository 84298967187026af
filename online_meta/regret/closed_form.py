"""Compute the best fixed meta-parameters in closed form, for losses after adaptation that are quadratic in them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.inner import Inner
from online_meta.metagrads.exact import exact
from online_meta.preflight.gradcheck import flatten
from online_meta.replay import generator
from online_meta.tree import to_float64
from online_meta.types import Meta, Params, Task

MAX_WEIGHTS = 1_000
"""The largest number of weights; a task's quadratic needs one meta-gradient per weight."""
TOLERANCE = 1e-6
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights (d,) -> f(U(w)), a scalar, and its gradient (d,)."""


class Quadratic(NamedTuple):
    """q(w) = w'Hw / 2 + g'w + c over d flattened weights: ``matrix`` H (d, d), ``slope`` g (d,), ``offset`` c ()."""

    matrix: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, weights: Tensor) -> Tensor:
        """Return q at ``weights``, shape (d,)."""
        return weights @ self.matrix @ weights / 2 + self.slope @ weights + self.offset

    def plus(self, other: "Quadratic") -> "Quadratic":
        """Return the sum of two quadratics."""
        return Quadratic(*(mine + others for mine, others in zip(self, other, strict=True)))

    def plus_constant(self, value: float) -> "Quadratic":
        """Return the quadratic with ``value`` added to its offset."""
        return self._replace(offset=self.offset + value)


class Minimum(NamedTuple):
    """The minimum ``value`` of a quadratic, and its minimiser ``weights`` (d,) with the smallest norm."""

    value: float
    weights: Tensor


def zero_quadratic(weights: int) -> Quadratic:
    """Return the zero quadratic over ``weights`` weights, in float64."""
    return Quadratic(*(torch.zeros(shape, dtype=torch.float64) for shape in ((weights, weights), (weights,), ())))


def quadratic_of(inner: Inner, meta: Meta, task: Task) -> Quadratic:
    """Return q(w) = f(U(w)) of a task, in float64 on the CPU.

    If the model is linear in its weights, the loss is the mean squared error and the inner rule is affine in the
    weights, then U is affine and f(U(w)) is a quadratic: c and g are its value and gradient at 0, and column i of H is
    its gradient at the unit vector e_i minus g. The result is checked at a random point.

    Args:
        inner: the inner loop U. The meta-gradients are exact, whatever estimator the learner uses.
        meta: gives the names and shapes of the weights, which are flattened in the order of the dict.
        task: a task of any floating-point dtype.

    Returns:
        The quadratic over all d weights.

    Raises:
        ValueError: if there are more than ``MAX_WEIGHTS`` weights, the rule has learned parameters, or f(U(w)) is not
            quadratic.
    """
    count = sum(value.numel() for value in meta.weights.values())
    if count > MAX_WEIGHTS:
        raise ValueError(f"the model has {count:,} weights; the closed form supports at most {MAX_WEIGHTS:,}")
    if meta.rule:
        raise ValueError(f"the inner rule learns {sorted(meta.rule)}, and f(U(w)) is not quadratic in them")
    task, gradient = to_float64(task), exact(inner)

    def evaluate(weights: Tensor) -> tuple[Tensor, Tensor]:
        found = gradient(Meta(_unflatten(weights, meta.weights), {}), task)
        return found.loss.detach().cpu().double(), flatten(to_float64(found.grads.weights)).detach().cpu()

    offset, slope = evaluate(torch.zeros(count, dtype=torch.float64))
    columns = [evaluate(unit)[1] - slope for unit in torch.eye(count, dtype=torch.float64)]
    matrix = torch.stack(columns, dim=1)
    found = Quadratic((matrix + matrix.T) / 2, slope, offset)
    _check_quadratic(found, evaluate, count)
    return found


def _check_quadratic(found: Quadratic, evaluate: Evaluate, count: int) -> None:
    point = torch.from_numpy(generator(count).standard_normal(count))
    predicted, actual = float(found(point)), float(evaluate(point)[0])
    if not abs(predicted - actual) <= TOLERANCE * (1 + abs(actual)):
        raise ValueError(
            f"f(U(w)) is not quadratic in the weights: at a random point it is {actual:.6g}, but the quadratic gives "
            f"{predicted:.6g}. "
            "The closed form needs a model that is linear in its weights, loss 'mse', and an inner rule that is affine"
        )


def minimise(quadratic: Quadratic) -> Minimum:
    """Return min_w q(w) = c - g' H^+ g / 2, exact to rounding; H must be positive semidefinite up to rounding."""
    weights = -torch.linalg.pinv(quadratic.matrix, hermitian=True) @ quadratic.slope
    return Minimum(float(quadratic(weights)), weights)


def _unflatten(weights: Tensor, like: Params) -> Params:
    parts = torch.split(weights, [value.numel() for value in like.values()])
    return {n: part.reshape(v.shape).to(v.device) for part, (n, v) in zip(parts, like.items(), strict=True)}
