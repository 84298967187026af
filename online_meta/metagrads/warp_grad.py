"""Warped gradient descent: train the parameters that shape the inner steps on each step, not through the whole loop."""

import torch

from online_meta.functional.autodiff import outside_inference_mode, vjp
from online_meta.inner import Inner, fast_weights, init_carry, query_loss, slow_weights, step
from online_meta.metagrads.first_order import first_order
from online_meta.metagrads.reptile import require_learned_start
from online_meta.tree import add, scale, zeros
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Params, Task

INITIALISATIONS = ("reptile", "first_order")


def warp_grad(inner: Inner, *, initialisation: str = "reptile") -> MetaGradient:
    """Return the estimator of WarpGrad's meta-gradient (Flennerhag et al., ICLR 2020, section 2.3).

    The warp omega is everything that does not adapt: the slow weights, i.e. warp layers outside ``inner.fast``, and the
    rule's parameters, e.g. T of a T-net. Its gradient is the mean over k = 0..K-1 of d/d omega f(step(phi_k; omega)),
    f the query loss, with phi_k and the rule's state held constant: second order, through one step at a time.
    Parameters that act through the rule's ``start`` alone get zeros.

    Args:
        inner: an inner loop of at least 1 step.
        initialisation: the direction of the weights that adapt: "reptile" for w - phi_K, phi_K adapted to the support
            set, or "first_order" for that estimator's gradient, at the cost of one more pass through the loop.

    Returns:
        A function (meta, task) -> the query loss after the last step and the gradient.

    Raises:
        ValueError: if ``initialisation`` is unknown, ``inner`` has no step, or it begins with fresh weights and
            ``initialisation`` is "reptile".
    """
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation is {initialisation!r}: it is one of {', '.join(INITIALISATIONS)}")
    if inner.steps < 1:
        raise ValueError(f"inner.steps is {inner.steps}; warp_grad needs at least 1 step")
    if initialisation == "reptile":
        require_learned_start(inner, 'warp_grad with initialisation = "reptile"')

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        with torch.no_grad():
            slow = Meta(slow_weights(inner, meta.weights), meta.rule)
            carry, total = init_carry(inner, meta, task.support), zeros(slow)
            for k in range(inner.steps):
                loss, share, carry = _warp_gradient(inner, slow, carry, task, k)
                total = add(total, share)
            warp = scale(total, 1 / inner.steps)
            if initialisation == "reptile":
                fast: Params = {n: value - carry.phi[n] for n, value in fast_weights(inner, meta.weights).items()}
            else:
                fast = fast_weights(inner, first_order(inner)(meta, task).grads.weights)
            weights = {**warp.weights, **fast}
            return MetaGrad(loss, Meta({name: weights[name] for name in meta.weights}, warp.rule))

    return outside_inference_mode(gradient)


def _warp_gradient(inner: Inner, slow: Meta, carry: Carry, task: Task, k: int) -> tuple[torch.Tensor, Meta, Carry]:
    """Return f(step(phi_k; omega)), its gradient with respect to omega, and the carry after the step."""

    def query_loss_after_step(slow: Meta, carry: Carry) -> tuple[torch.Tensor, Carry]:
        after = step(inner, slow, carry, task.support, k)
        return query_loss(inner, slow, after.phi, task.query), after

    # The inner gradient is recorded only if phi is an input of the vjp; phi's own cotangent is discarded.
    (loss, after), pull = vjp(query_loss_after_step, slow, carry)
    share, _ = pull((torch.ones_like(loss), zeros(after)))
    return loss, share, after
