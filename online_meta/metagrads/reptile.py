"""Reptile: move towards the adapted weights."""

import torch

from online_meta.batches import concat_support_query
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import Inner, fast_weights, query_loss, run_inner_loop
from online_meta.tree import zeros
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def reptile(inner: Inner) -> MetaGradient:
    """Return the estimator of Reptile's direction w - phi_K (Nichol et al., 2018, algorithm 1).

    phi_K is adapted to support and query together, because Reptile has no query set. The loss is the query loss at
    phi_K, which was adapted to the query set: do not use it as a score. The mean over a meta-batch is the paper's
    batched form. Slow weights and the rule's own parameters get zeros.

    Args:
        inner: the inner loop; its rule is the inner optimizer, ``sgd``, or ``adam`` as in the paper's experiments.

    Returns:
        A function (meta, task) -> the query loss and the direction.

    Raises:
        ValueError: if ``inner`` begins with fresh weights.
    """
    require_learned_start(inner, "reptile")

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = concat_support_query(task)
        phi = run_inner_loop(inner, meta, everything).phi
        with torch.no_grad():
            moved = {name: value - phi[name] for name, value in fast_weights(inner, meta.weights).items()}
            loss = query_loss(inner, meta, phi, task.query)
            return MetaGrad(loss, Meta({**zeros(meta.weights), **moved}, zeros(meta.rule)))

    return outside_inference_mode(gradient)


def require_learned_start(inner: Inner, estimator: str) -> None:
    """Raise ``ValueError`` if ``inner`` begins with fresh weights: then w - phi_K says nothing about w."""
    if inner.begin != "weights":
        raise ValueError(
            f'{estimator} moves the weights that each task starts from, but begin = "{inner.begin}" draws them anew: '
            'use begin = "weights", or another estimator, such as exact'
        )
