"""Warped gradient descent: what shapes the inner steps is trained on each of them, not through all of them."""

import torch

from online_meta.functional.autodiff import vjp
from online_meta.inner import Inner, fast_weights, init_carry, query_loss, slow_weights, step
from online_meta.metagrads.first_order import first_order
from online_meta.tree import add, scale, zeros
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Params, Task

INITIALISATIONS = ("reptile", "first_order")


def warp_grad(inner: Inner, *, initialisation: str = "reptile") -> MetaGradient:
    """Return the estimator of WarpGrad's meta-gradient (Flennerhag et al., ICLR 2020, section 2.3).

    The warp omega is all that does not adapt: the slow weights, of warp layers that ``inner.fast`` leaves out, and what
    the rule learns, T of a T-net say. Its gradient is the mean over k = 0..K-1 of d/d omega f(step(phi_k; omega)), f
    the query loss, with phi_k and the rule's state there held constant: second order, through one step at a time.
    What acts through ``start`` alone therefore has gradient 0. The initialisation of the weights that adapt has
    Reptile's direction w - phi_K, phi_K adapted to the support set, or ``first_order``'s gradient, for one
    more pass through the loop. The loss is that of the query set after the last step.
    Raises ``ValueError`` for another ``initialisation`` or an inner loop without a step.
    """
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation is {initialisation!r}: it is one of {', '.join(INITIALISATIONS)}")
    if inner.steps < 1:
        raise ValueError(f"inner.steps is {inner.steps}: a warp is trained on 1 step or more")

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        with torch.no_grad():
            slow = Meta(slow_weights(inner, meta.weights), meta.rule)
            carry, total = init_carry(inner, meta, task.support), zeros(slow)
            for k in range(inner.steps):
                loss, share, carry = _warp_gradient(inner, slow, carry, task, k)
                total = add(total, share)
            warp = scale(total, 1 / inner.steps)
            if initialisation == "reptile":
                fast: Params = {name: meta.weights[name] - value for name, value in carry.phi.items()}
            else:
                fast = fast_weights(inner, first_order(inner)(meta, task).grads.weights)
            weights = {**warp.weights, **fast}
            return MetaGrad(loss, Meta({name: weights[name] for name in meta.weights}, warp.rule))

    return gradient


def _warp_gradient(inner: Inner, slow: Meta, carry: Carry, task: Task, k: int) -> tuple[torch.Tensor, Meta, Carry]:
    """Return f(step(phi_k; omega)), its gradient by omega, and the carry after the step."""

    def query_loss_after_step(slow: Meta, carry: Carry) -> tuple[torch.Tensor, Carry]:
        after = step(inner, slow, carry, task.support, k)
        return query_loss(inner, slow, after.phi, task.query), after

    # The inner gradient is recorded only where phi is; what phi itself gets is thrown away.
    (loss, after), pull = vjp(query_loss_after_step, slow, carry)
    share, _ = pull((torch.ones_like(loss), zeros(after)))
    return loss, share, after
