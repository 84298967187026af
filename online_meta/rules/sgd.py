"""Gradient descent, the inner rule of MAML."""

from online_meta.types import Carry, InnerRule, Params, Seen


def sgd(lr: float = 0.01) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - lr * grad L(phi_k) (Finn et al., ICML 2017, eq. 1).

    Args:
        lr: inner learning rate, above 0.

    Returns:
        The rule; it has no learned parameters and no state.

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi, support: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
    )
