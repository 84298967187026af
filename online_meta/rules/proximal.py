"""Gradient descent with a proximal term that pulls back to the start: the inner problem of implicit MAML."""

from online_meta.types import Carry, InnerRule, Params, Seen


def proximal(lr: float = 0.01, strength: float = 1.0) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - lr (grad L(phi_k) + strength (phi_k - phi_0)).

    It is gradient descent on L(phi) + strength / 2 ||phi - phi_0||^2 (iMAML: Rajeswaran et al., NeurIPS 2019, eq. 3).
    The estimator ``implicit`` differentiates its minimiser; all others differentiate the steps. As the prior of a task
    with n samples, the term has the precision n strength, which ``laplace`` takes from here.

    Args:
        lr: inner learning rate, above 0.
        strength: strength of the proximal term, above 0 and below 2 / lr; above, the term alone would diverge.

    Returns:
        The rule; its state is phi_0.

    Raises:
        ValueError: if an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if not 0 < strength < 2 / lr:
        raise ValueError(f"strength is {strength}: with lr = {lr} it is positive and below 2 / lr = {2 / lr:g}")

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        start = carry.state
        moved = {n: phi - lr * (seen.grads[n] + strength * (phi - start[n])) for n, phi in carry.phi.items()}
        return Carry(moved, start)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi, support: Carry(phi, phi),
        update=update,
        view=lambda rule, weights: weights,
        strength=strength,
    )
