"""Gradient descent with momentum."""

from online_meta.tree import zeros
from online_meta.types import Carry, InnerRule, Params, Seen


def momentum(lr: float = 0.01, momentum: float = 0.9, nesterov: bool = False) -> InnerRule:
    """Return the rule v_{k+1} = mu v_k + grad L(phi_k), phi_{k+1} = phi_k - lr v_{k+1} (Polyak, 1964).

    v_0 = 0. The steps equal those of ``torch.optim.SGD``.

    Args:
        lr: inner learning rate, above 0.
        momentum: mu, in [0, 1).
        nesterov: step along grad L(phi_k) + mu v_{k+1} instead (Sutskever et al., ICML 2013).

    Returns:
        The rule; its state is the velocity v, of one tensor per weight.

    Raises:
        ValueError: if ``lr`` or ``momentum`` is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: it lies in [0, 1)")

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        velocity = {name: momentum * carry.state[name] + grad for name, grad in seen.grads.items()}
        along = {name: grad + momentum * velocity[name] for name, grad in seen.grads.items()} if nesterov else velocity
        return Carry({name: phi - lr * along[name] for name, phi in carry.phi.items()}, velocity)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi, support: Carry(phi, zeros(phi)),
        update=update,
        view=lambda rule, weights: weights,
    )
