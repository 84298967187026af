"""The plain gradient of the loss on all of a task: no inner loop."""

import torch
from torch.func import grad_and_value

from online_meta.inner import Inner, see
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Params, Task


def supervised(inner: Inner) -> MetaGradient:
    """Return the gradient of L(w; support and query together): joint training, which does not adapt.

    The step of *train on everything*, the baseline of Finn et al., ICML 2019, section 5. ``inner`` gives
    the loss alone.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))

        def joint(weights: Params, rule: Params) -> torch.Tensor:
            return inner.loss(see(inner, Meta(weights, rule), {}), everything)

        with torch.no_grad():
            grads, loss = grad_and_value(joint, argnums=(0, 1))(meta.weights, meta.rule)
            return MetaGrad(loss, Meta(*grads))

    return gradient
