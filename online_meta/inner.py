"""The inner loop: adapt meta-parameters to one task. There is no other inner loop in the project."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from online_meta.functional.autodiff import gradient
from online_meta.functional.randomness import INIT_STEP, seeded
from online_meta.types import Batch, Carry, InnerRule, LossFn, Meta, Params


@dataclass(frozen=True)
class Inner:
    """How to adapt: phi_0 = fast weights of w, phi_{k+1} = update(phi_k, grad L(phi_k)), ``steps`` times.

    MAML (Finn et al., ICML 2017) with ``rules.sgd``. ``loss`` is the model as a ``LossFn``; ``fast``
    holds name globs of the weights that adapt: ``("*",)`` all, ``("head.*",)`` is ANIL (Raghu et
    al., ICLR 2020), ``("body.*",)`` BOIL (Oh et al., ICLR 2021). A loss or rule that says that it is ``random``
    draws numbers that are a function of the task and the step. Raises ``ValueError`` for a negative number of steps.
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
        """Return meta-parameters that start from detached copies of ``weights``, without those that the loss freezes.

        Raises ``ValueError`` when a glob of ``fast`` matches no weight.
        """
        frozen: frozenset[str] = getattr(self.loss, "frozen", frozenset())
        weights = {name: value for name, value in weights.items() if name not in frozen}
        if frozen and not weights:
            raise ValueError("the model has no weight to learn: all are frozen (their requires_grad is false)")
        for pattern in self.fast:
            if not any(fnmatchcase(name, pattern) for name in weights):
                raise ValueError(f"fast = {pattern!r} matches none of the weights {sorted(weights)}")
        copies = {name: value.detach().clone() for name, value in weights.items()}
        return Meta(copies, self.rule.init(fast_weights(self, copies)))

    def adapt(self, meta: Meta, support: Batch) -> Params:
        """Return the parameters that the model has after adapting to ``support``; keeps no graph."""
        with torch.no_grad():
            return effective_params(self, meta, run_inner_loop(self, meta, support).phi)


def fast_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that adapt."""
    return {n: w for n, w in weights.items() if any(fnmatchcase(n, glob) for glob in inner.fast)}


def slow_weights(inner: Inner, weights: Params) -> Params:
    """Return the weights that the inner loop leaves alone."""
    fast = fast_weights(inner, weights)
    return {n: w for n, w in weights.items() if n not in fast}


def effective_params(inner: Inner, meta: Meta, phi: Params) -> Params:
    """Return what the model is called with: slow weights and ``phi``, through the rule's view."""
    return inner.rule.view(meta.rule, {**meta.weights, **phi})


def init_carry(inner: Inner, meta: Meta, support: Batch) -> Carry:
    """Return the carry before the first step: phi_0 and the rule's first state."""
    with _seeded_if_random(inner, support, INIT_STEP):
        return inner.rule.start(meta.rule, fast_weights(inner, meta.weights))


def support_gradient(inner: Inner, meta: Meta, phi: Params, support: Batch, k: int) -> Params:
    """Return grad L(phi) on the support set at inner step ``k``, differentiable once more."""

    def objective(fast: Params) -> Tensor:
        return inner.loss(effective_params(inner, meta, fast), support)

    with _seeded_if_random(inner, support, k + 1):
        return gradient(objective, phi)


def step(inner: Inner, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
    """Return the carry after inner step ``k``; a pure function that can be differentiated.

    ``meta.weights`` need hold only the slow weights: the fast ones are read from ``carry``.
    """
    return apply_update(inner, meta, carry, support_gradient(inner, meta, carry.phi, support, k), support, k)


def apply_update(inner: Inner, meta: Meta, carry: Carry, grads: Params, support: Batch, k: int) -> Carry:
    """Return the carry after the rule's update ``k`` by the gradients ``grads``."""
    with _seeded_if_random(inner, support, k + 1):
        return inner.rule.update(meta.rule, carry, grads, k)


def run_inner_loop(inner: Inner, meta: Meta, support: Batch) -> Carry:
    """Return the carry after the last step; keeps no graph."""
    with torch.no_grad():
        carry = init_carry(inner, meta, support)
        for k in range(inner.steps):
            carry = step(inner, meta, carry, support, k)
        return carry


def query_loss(inner: Inner, meta: Meta, phi: Params, query: Batch) -> Tensor:
    """Return the loss that the meta-gradient is of: that of ``phi`` on the query set."""
    with _seeded_if_random(inner, query, INIT_STEP):
        return inner.loss(effective_params(inner, meta, phi), query)


def _seeded_if_random(inner: Inner, batch: Batch, step: int) -> AbstractContextManager[None]:
    random = inner.rule.random or getattr(inner.loss, "random", False)
    return seeded(batch, step) if random else nullcontext()
