"""First-order MAML: treats the inner gradients as constants."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from online_meta.functional.autodiff import is_transformed, outside_inference_mode
from online_meta.inner import Inner, apply_update, see_support, support_loss
from online_meta.metagrads._adjoint import StepFn, pull_back, require_cut, require_query_chunk, require_step_weights
from online_meta.types import Batch, Carry, Meta, MetaGrad, MetaGradient, Seen, Task


def first_order(
    inner: Inner,
    *,
    step_weights: Sequence[float] | None = None,
    cut: int | None = None,
    query_chunk: int | None = None,
) -> MetaGradient:
    """Return the estimator that treats every inner gradient g_k = grad L(phi_k) as a constant.

    The loss L(phi_k), if the rule reads it, is not held constant (Andrychowicz et al., NeurIPS 2016, section 2.1).
    For SGD the adjoint passes through the steps unchanged, so the gradient is grad f(phi_K): FOMAML (Finn et
    al., ICML 2017, section 5.2). A rule's own parameters get their first-order gradient too.

    Args:
        inner: the inner loop of K steps.
        step_weights: weights of the losses after each step, as in ``exact``. None for f(phi_K).
        cut: the number of steps that a loss is differentiated through at most, as in ``exact``. None for all.
        query_chunk: the largest number of query samples whose graph is held at once, as in ``exact``. None for all.

    Returns:
        A function (meta, task) -> the query loss and the first-order gradient.

    Raises:
        ValueError: if there are not K ``step_weights``, one is negative or all are 0, if ``cut`` is below 1, or if the
            query set cannot be computed in chunks.
    """
    weights = None if step_weights is None else require_step_weights(step_weights, inner.steps)
    require_cut(cut)
    require_query_chunk(inner, query_chunk)

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def run_step(slow: Meta, carry: Carry, k: int) -> tuple[Carry, StepFn]:
            seen = see_support(inner, slow, carry.phi, task.support, k)
            after, uses_loss = _apply_update(inner, slow, carry, seen, task.support, k)

            def step_fn(slow: Meta, carry: Carry) -> Carry:
                loss = support_loss(inner, slow, carry.phi, task.support, k) if uses_loss else seen.loss
                return apply_update(inner, slow, carry, seen._replace(loss=loss), task.support, k)

            return after, step_fn

        return pull_back(inner, meta, task, run_step, weights=weights, cut=cut, query_chunk=query_chunk)

    return outside_inference_mode(gradient)


def _apply_update(inner: Inner, slow: Meta, carry: Carry, seen: Seen, support: Batch, k: int) -> tuple[Carry, bool]:
    """Return the carry after step ``k``, and whether it depends on the support loss, which few rules read."""
    depends = False

    def update(loss: Tensor) -> Carry:
        nonlocal depends
        after = apply_update(inner, slow, carry, seen._replace(loss=loss), support, k)
        depends = any(value.requires_grad for part in after for value in part.values())
        return after

    if is_transformed():
        return torch.func.vjp(update, seen.loss)[0], depends
    with torch.enable_grad():
        after = update(seen.loss.detach().requires_grad_())
    return tree_map(torch.Tensor.detach, after) if depends else after, depends
