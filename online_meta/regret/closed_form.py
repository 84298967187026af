"""The best fixed meta-parameters by algebra, where adapting and the loss make a quadratic of them."""

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
"""A task's quadratic takes a meta-gradient for each weight."""
TOLERANCE = 1e-6
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights (d,) -> f(U(w)), and its gradient (d,)."""


class Quadratic(NamedTuple):
    """q(w) = w'Hw / 2 + g'w + c over d weights laid side by side: ``matrix`` (d, d), ``slope`` (d,), ``offset`` ()."""

    matrix: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, weights: Tensor) -> Tensor:
        """Return q at ``weights``, (d,)."""
        return weights @ self.matrix @ weights / 2 + self.slope @ weights + self.offset

    def plus(self, other: "Quadratic") -> "Quadratic":
        """Return the sum of both."""
        return Quadratic(*(mine + others for mine, others in zip(self, other, strict=True)))


class Minimum(NamedTuple):
    """The least ``value`` of a quadratic, and the shortest of the ``weights`` (d,) that it is taken at."""

    value: float
    weights: Tensor


def zero_quadratic(weights: int) -> Quadratic:
    """Return the sum of no quadratics of so many weights, in float64."""
    return Quadratic(*(torch.zeros(shape, dtype=torch.float64) for shape in ((weights, weights), (weights,), ())))


def quadratic_of(inner: Inner, meta: Meta, task: Task) -> Quadratic:
    """Return q(w) = f(U(w)) of a task, in float64 on the CPU.

    Where a model is linear in its weights, the loss is the mean squared error and the inner rule is affine in them,
    so is U, and f(U(w)) is a quadratic in w: c and g are its value and gradient at 0, and the column i of H is its
    gradient at the unit vector e_i less g. Whether it is one is tried at a point drawn at random.

    Args:
        inner: how a task is adapted to; any estimator of its gradients may be used to learn, this is the exact one.
        meta: for the names and shapes of the weights, which lie side by side in the order of their dict.
        task: floating point of any precision.

    Raises:
        ValueError: when there are more than ``MAX_WEIGHTS`` weights, the rule learns parameters of its own, or
            f(U(w)) is no quadratic.
    """
    count = sum(value.numel() for value in meta.weights.values())
    if count > MAX_WEIGHTS:
        raise ValueError(f"the model has {count:,} weights, and the algebra is for {MAX_WEIGHTS:,} at most")
    if meta.rule:
        raise ValueError(f"the inner rule learns {sorted(meta.rule)}, in which f(U(w)) is no quadratic")
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
            f"f(U(w)) is no quadratic in the weights: at a random point it is {actual:.6g}, "
            f"by algebra {predicted:.6g}. It "
            "is one for a model that is linear in its weights, with loss 'mse' and an inner rule that is affine in them"
        )


def minimise(quadratic: Quadratic) -> Minimum:
    """Return min_w q(w) = c - g' H^+ g / 2, exact to rounding; H has no negative eigenvalue but by rounding."""
    weights = -torch.linalg.pinv(quadratic.matrix, hermitian=True) @ quadratic.slope
    return Minimum(float(quadratic(weights)), weights)


def _unflatten(weights: Tensor, like: Params) -> Params:
    parts = torch.split(weights, [value.numel() for value in like.values()])
    return {n: part.reshape(v.shape).to(v.device) for part, (n, v) in zip(parts, like.items(), strict=True)}
