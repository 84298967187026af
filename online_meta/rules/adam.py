"""Adam as the inner rule."""

from collections.abc import Callable, Sequence

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
        return _move_as_one(move, carry, seen.grads, step) if _are_small(carry.phi) else move(carry, seen.grads, step)

    def move(carry: Carry, grads: Params, step: int) -> Carry:
        state = {f"mean.{n}": first * carry.state[f"mean.{n}"] + (1 - first) * grad for n, grad in grads.items()}
        for name, grad in grads.items():
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


ALL = "all"
"""The name of all weights where they are one vector."""

FEW_NUMBERS = 1 << 16
"""The largest number of weights that are copied into one vector in each step."""


def _are_small(phi: Params) -> bool:
    """Return whether weights are to be one vector: several few numbers of one kind, where nothing is differentiated."""
    if len(phi) < 2 or torch.is_grad_enabled():
        return False
    kinds = {(value.dtype, value.device) for value in phi.values()}
    return len(kinds) == 1 and sum(value.numel() for value in phi.values()) <= FEW_NUMBERS


def _move_as_one(move: Callable[[Carry, Params, int], Carry], carry: Carry, grads: Params, step: int) -> Carry:
    """Return what ``move`` does: the same numbers, in as many operations as a single tensor takes."""
    means, squares = _split_state(carry.state, carry.phi)
    phi, mean, square, grad = (_join(one, carry.phi) for one in (carry.phi, means, squares, grads))
    after = move(Carry({ALL: phi}, {f"mean.{ALL}": mean, f"square.{ALL}": square}), {ALL: grad}, step)
    state = {
        f"{part}.{name}": value
        for part in ("mean", "square")
        for name, value in _split(after.state[f"{part}.{ALL}"], carry.phi).items()
    }
    return Carry(_split(after.phi[ALL], carry.phi), state)


def _split_state(state: Params, phi: Params) -> list[Params]:
    return [{name: state[f"{part}.{name}"] for name in phi} for part in ("mean", "square")]


def _join(values: Params, phi: Params) -> Tensor:
    return torch.cat([values[name].reshape(-1) for name in phi])


def _split(vector: Tensor, phi: Params) -> Params:
    parts = torch.split(vector, [value.numel() for value in phi.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, phi.items(), strict=True)}


def _root(square: Tensor) -> Tensor:
    """Return the square root with derivative 0 at 0; both branches of ``where`` must have finite derivatives there."""
    if not torch.is_grad_enabled():  # It is the same number, for a running mean of squares is not below 0.
        return square.sqrt()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
