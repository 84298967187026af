"""CAVIA: a context vector alone adapts, anew for each task."""

from online_meta.tree import zeros
from online_meta.types import Carry, InnerRule, Params


def cavia(lr: float = 0.01) -> InnerRule:
    """Return the rule phi_0 = 0, phi_{k+1} = phi_k - lr * grad L(phi_k) (Zintgraf et al., ICML 2019, eq. 4).

    It is for ``fast`` globs of context parameters, ``fast=("context",)`` say, that the model takes as a further input
    and that are 0 at the start of each task, whatever their value in the model: so their meta-gradient is 0, and
    all else is learned through them. ``lr`` is a positive float. Raises ``ValueError`` when it is not.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        return Carry({name: phi - lr * grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi: Carry(zeros(phi), {}),
        update=update,
        view=lambda rule, weights: weights,
    )
