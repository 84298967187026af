"""Reptile: move towards where the inner loop ends."""

import torch

from online_meta.inner import Inner, query_loss, run_inner_loop
from online_meta.tree import zeros
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Task


def reptile(inner: Inner) -> MetaGradient:
    """Return the direction w - phi_K, phi_K adapted to the whole task (Nichol et al., 2018, algorithm 1).

    The inner optimizer is ``inner.rule``: ``sgd``, or ``adam`` as in the paper's experiments; over a meta-batch the
    mean is the paper's batched form. Reptile has no query set, so the inner loop sees support and query together; the
    loss is that of the query set at phi_K, which has therefore seen it: do not score with it. Slow weights and the
    rule's own parameters have no direction: zeros.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
        phi = run_inner_loop(inner, meta, everything).phi
        with torch.no_grad():
            moved = {name: meta.weights[name] - value for name, value in phi.items()}
            loss = query_loss(inner, meta, phi, task.query)
            return MetaGrad(loss, Meta({**zeros(meta.weights), **moved}, zeros(meta.rule)))

    return gradient
