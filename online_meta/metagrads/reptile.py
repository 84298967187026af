"""Reptile: move towards where the inner loop ends."""

import torch

from online_meta.inner import Inner
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Task


def reptile(inner: Inner) -> MetaGradient:
    """Return the direction w - phi_K, phi_K adapted to the whole task (Nichol et al., 2018, algorithm 1).

    Reptile has no query set, so the inner loop sees support and query together; the loss is that of the
    query set at phi_K, which has therefore seen it: do not score with it. Slow weights and the rule's own
    parameters have no direction: zeros.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
        adapted = inner.adapt(meta, everything)
        with torch.no_grad():
            weights = {name: weight - adapted[name] for name, weight in meta.weights.items()}
            rule = {name: torch.zeros_like(value) for name, value in meta.rule.items()}
            return MetaGrad(inner.loss(adapted, task.query), Meta(weights, rule))

    return gradient
