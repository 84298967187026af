"""What the rules share that make the head of the model in closed form and adapt by gradient descent from there."""

import math

import torch
from torch import Tensor

from online_meta.types import Carry, HeadSolver, InnerRule, LinearHead, Params, Seen

LOG_STRENGTH, LOG_SCALE = "log_strength", "log_scale"
"""The names of the learned parameters: logarithms of the strength of the penalty, and of a factor of the output."""


def rule_of_head(head: HeadSolver, lr: float, **learned: float) -> InnerRule:
    """Return gradient descent from weights whose head is that of ``head``.

    Args:
        head: makes the head.
        lr: inner learning rate, above 0.
        learned: initial values of the rule's learned parameters, which are numbers.

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    require_positive(lr=lr)

    def init(weights: Params) -> Params:
        some = next(iter(weights.values()))
        return {name: some.new_tensor(value) for name, value in learned.items()}

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=init,
        start=lambda rule, phi, support: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
        head=head,
    )


def require_positive(**options: float) -> None:
    """Raise ``ValueError`` for an option that is not positive and finite."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it is positive and finite")


def add_constant(features: Tensor, given: LinearHead) -> Tensor:
    """Return the features (n, d) with a column of ones if the head has a bias."""
    return features if given.bias is None else torch.cat([features, torch.ones_like(features[:, :1])], 1)


def as_head(weights: Tensor, given: LinearHead) -> LinearHead:
    """Return the head with the weights (d, k) of features with a constant, or (d - 1, k) and a bias (k,)."""
    if given.bias is None:
        return LinearHead(weights.T, None)
    return LinearHead(weights[:-1].T, weights[-1])
