"""Adam as the inner rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from online_meta.types import Batch, Carry, InnerRule, Params, Seen


def adam(lr: float = 0.001, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - lr m^ / (sqrt(v^) + eps) (Kingma & Ba, ICLR 2015, algorithm 1).

    m and v are running means of the gradient and its square; m^ and v^ are corrected for their bias by 1 - beta^(k+1).
    The steps equal those of ``torch.optim.Adam``. If v is 0, its root is treated as constant, so that a weight without
    a gradient, e.g. after a dead ReLU, has a finite derivative. If a gradient is smaller than ``eps``, the derivative
    can be as large as 1 / eps.

    Args:
        lr: inner learning rate, above 0.
        betas: decay rates of the running means of the gradient and its square, both in [0, 1).
        eps: added to the root, above 0.

    Returns:
        The rule; its state has the running means, as two tensors per weight.

    Raises:
        ValueError: if an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: they are two numbers in [0, 1)")
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it is positive, 1e-8 say")
    first, second = betas

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry(
            phi, {f"{part}.{name}": torch.zeros_like(w) for part in ("mean", "square") for name, w in phi.items()}
        )

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        state = {f"mean.{n}": first * carry.state[f"mean.{n}"] + (1 - first) * grad for n, grad in seen.grads.items()}
        for name, grad in seen.grads.items():
            state[f"square.{name}"] = second * carry.state[f"square.{name}"] + (1 - second) * grad * grad
        size, unbiased = lr / (1 - first ** (step + 1)), (1 - second ** (step + 1)) ** 0.5
        moved = {
            name: phi - size * state[f"mean.{name}"] / (_root(state[f"square.{name}"]) / unbiased + eps)
            for name, phi in carry.phi.items()
        }
        return Carry(moved, state)

    return InnerRule(
        init=lambda weights: {},
        start=start,
        update=update,
        view=lambda rule, weights: weights,
    )


def _root(square: Tensor) -> Tensor:
    """Return the square root with derivative 0 at 0; both branches of ``where`` must have finite derivatives there."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
