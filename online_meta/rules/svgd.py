"""Stein variational gradient descent: several models adapt at once, and keep apart."""

import math

import torch
from torch import Tensor

from online_meta.functional.keyed import draw_alike, keyed
from online_meta.functional.randomness import INIT_STEP
from online_meta.types import Batch, Carry, InnerRule, Params, Seen

PREFIX = "particles."
"""What the names of all particles but the first begin with; they are stacked, (M - 1, ...)."""


def svgd(lr: float = 0.01, particles: int = 1, precision: float = 0.0) -> InnerRule:
    """Return the rule theta_m <- theta_m + lr / M sum_j [k(theta_j, theta_m) g_j + grad_j k(theta_j, theta_m) / n].

    Here g_j = -grad L(theta_j) - precision theta_j / n, which is 1 / n of the gradient of the log-posterior of n
    samples whose mean negative log-likelihood is L, under the prior N(0, I / precision). This is the step of Liu & Wang
    (NeurIPS 2016, algorithm 1) at the rate lr / n, so that M = 1 is gradient descent, and it is the inner loop of
    Bayesian MAML (Yoon et al., NeurIPS 2018). k(a, b) = exp(-|a - b|^2 / h) with h = med^2 / log M, where med is the
    median of the distances between particles. grad_j k holds h constant; meta-gradients pass through it.

    The weights that adapt are the first particle. All others are learned by the rule, and start like initialisations of
    their own, with the mean and the standard deviation of each of these weights. Weights that do not adapt are shared.
    The posterior ``particles`` answers by all of them. The loss should be in nats, such as ``gaussian_of_noise``.

    Args:
        lr: inner learning rate, above 0.
        particles: their number M, at least 1.
        precision: of the prior of the weights that adapt, at least 0.

    Returns:
        The rule; it learns M - 1 particles.

    Raises:
        ValueError: if an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if particles < 1:
        raise ValueError(f"particles is {particles}: there is 1 or more")
    if not 0 <= precision < math.inf:
        raise ValueError(f"precision is {precision}: that of a prior is 0 or more, and finite")

    def init(weights: Params) -> Params:
        return _draw_others(weights, particles - 1) if particles > 1 and weights else {}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry({**phi, **rule}, {})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        if not rule and particles > 1:  # No weight adapts.
            return carry
        names = [name for name in carry.phi if PREFIX + name in carry.phi or particles == 1]
        phi, grads = (_stack(part, names, particles) for part in (carry.phi, seen.grads))
        if precision:
            grads = {name: grad + precision / seen.size * phi[name] for name, grad in grads.items()}
        moved = _move(phi, grads, lr, seen.size)
        first = {name: value[0] for name, value in moved.items()}
        return Carry({**first, **{PREFIX + name: value[1:] for name, value in moved.items() if particles > 1}}, {})

    return InnerRule(
        init=init,
        start=start,
        update=update,
        view=lambda rule, weights: _view(rule, weights)[0],
        particles=_view,
    )


def _draw_others(weights: Params, count: int) -> Params:
    """Draw ``count`` initialisations that are like ``weights``; they are a function of these."""
    each = []
    for number in range(1, count + 1):
        with keyed(Batch(weights, weights), INIT_STEP, "begin", seed=number):
            each.append(draw_alike(weights))
    return {PREFIX + name: torch.stack([one[name] for one in each]) for name in weights}


def _view(rule: Params, weights: Params) -> list[Params]:
    """Return the weights of each particle; those of the first one where the weights are not adapted."""
    if not rule:
        return [weights]
    first = {name: value for name, value in weights.items() if name not in rule}
    others = {name.removeprefix(PREFIX): weights[name] for name in rule if name in weights}
    count = len(next(iter(others.values()))) if others else 0
    return [first, *({**first, **{name: value[m] for name, value in others.items()}} for m in range(count))]


def _stack(values: Params, names: list[str], count: int) -> Params:
    if count == 1:
        return {name: values[name][None] for name in names}
    return {name: torch.cat([values[name][None], values[PREFIX + name]]) for name in names}


def _move(phi: Params, grads: Params, lr: float, size: Tensor | float) -> Params:
    """Return the particles (M, ...) after a step with the gradients of 1 / n of their negative log-posteriors."""
    count = len(next(iter(phi.values())))
    if count == 1:
        return {name: value - lr * grads[name] for name, value in phi.items()}
    kernel, width = measure_kernel(phi)
    total = kernel.sum(0)
    moved = {}
    for name, value in phi.items():
        flat, grad = (one.reshape(count, -1) for one in (value, grads[name]))  # A weight may be a single number.
        # sum_j grad_j k(theta_j, theta_m) = 2 / h sum_j (theta_m - theta_j) k(theta_j, theta_m)
        apart = 2 / width * (total[:, None] * flat - kernel @ flat)
        moved[name] = value + (lr / count * (apart / size - kernel @ grad)).reshape(value.shape)
    return moved


def measure_kernel(phi: Params) -> tuple[Tensor, Tensor]:
    """Return k(theta_j, theta_m), (M, M), and its width h; phi holds M >= 2 particles, each tensor (M, ...).

    If most particles are the same, h is 1 / log M.
    """
    count = len(next(iter(phi.values())))
    squares = [(value[:, None] - value[None]).square().reshape(count, count, -1).sum(-1) for value in phi.values()]
    distances = torch.stack(squares).sum(0)
    row, column = torch.triu_indices(count, count, 1, device=distances.device)
    median = distances[row, column].median()
    width = torch.where(median > 0, median, 1.0) / math.log(count)
    return torch.exp(-distances / width), width
