"""CAVIA: adapt only context parameters, starting from zero for each task."""

from online_meta.tree import zeros
from online_meta.types import Carry, InnerRule, Params, Seen


def cavia(lr: float = 0.01) -> InnerRule:
    """Return the rule phi_0 = 0, phi_{k+1} = phi_k - lr * grad L(phi_k) (Zintgraf et al., ICML 2019, eq. 4).

    Use it with ``fast`` globs that select context parameters, e.g. ``fast=("context",)``, which the model reads as an
    additional input. They start at 0 in each task, whatever their value in the model, so their meta-gradient is 0; all
    other weights are meta-learned through the adaptation of the context.

    Args:
        lr: inner learning rate, above 0.

    Returns:
        The rule.

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi, support: Carry(zeros(phi), {}),
        update=update,
        view=lambda rule, weights: weights,
    )
