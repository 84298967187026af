"""The inner loop: adapt meta-parameters to one task. There is no other inner loop in the project."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.func import grad

from online_meta.types import Batch, Carry, InnerRule, LossFn, Meta, Params


@dataclass(frozen=True)
class Inner:
    """How to adapt: phi_0 = fast weights of w, phi_{k+1} = update(phi_k, grad L(phi_k)), ``steps`` times.

    MAML (Finn et al., ICML 2017) with ``rules.sgd``. ``loss`` is the model as a ``LossFn``; ``fast``
    holds name globs of the weights that adapt: ``("*",)`` all, ``("head.*",)`` is ANIL (Raghu et
    al., ICLR 2020). Raises ``ValueError`` for a negative number of steps.
    """

    loss: LossFn
    rule: InnerRule
    steps: int = 5
    fast: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}: an inner loop takes 0 steps or more")

    def init(self, weights: Params) -> Meta:
        """Return meta-parameters that start from detached copies of ``weights``.

        Raises ``ValueError`` when a glob of ``fast`` matches no weight.
        """
        for pattern in self.fast:
            if not any(fnmatchcase(name, pattern) for name in weights):
                raise ValueError(f"fast = {pattern!r} matches none of the weights {sorted(weights)}")
        copies = {name: value.detach().clone() for name, value in weights.items()}
        return Meta(copies, self.rule.init(fast_weights(self, copies)))

    def adapt(self, meta: Meta, support: Batch) -> Params:
        """Return the parameters that the model has after adapting to ``support``; keeps no graph."""
        with torch.no_grad():
            carry = begin(self, meta)
            for k in range(self.steps):
                carry = step(self, meta, carry, support, k)
            return see(self, meta, carry.phi)


def fast_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that adapt."""
    return {n: w for n, w in weights.items() if any(fnmatchcase(n, glob) for glob in inner.fast)}


def slow_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that the inner loop leaves alone."""
    fast = fast_weights(inner, weights)
    return {n: w for n, w in weights.items() if n not in fast}


def see(inner: Inner, meta: Meta, phi: Params) -> Params:
    """Return what the model is called with: slow weights and ``phi``, through the rule's view."""
    return inner.rule.view(meta.rule, {**meta.weights, **phi})


def begin(inner: Inner, meta: Meta) -> Carry:
    """Return the carry before the first step: phi_0 and the rule's first state."""
    phi = fast_weights(inner, meta.weights)
    return Carry(phi, inner.rule.start(meta.rule, phi))


def support_gradient(inner: Inner, meta: Meta, phi: Params, support: Batch) -> Params:
    """Return grad L(phi) on the support set, differentiable once more."""

    def objective(fast: Params) -> torch.Tensor:
        return inner.loss(see(inner, meta, fast), support)

    gradient: Params = grad(objective)(phi)
    return gradient


def step(inner: Inner, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
    """Return the carry after inner step ``k``; a pure function that ``torch.func`` can differentiate.

    ``meta.weights`` need hold only the slow weights: the fast ones are read from ``carry``.
    """
    return inner.rule.update(meta.rule, carry, support_gradient(inner, meta, carry.phi, support), k)
