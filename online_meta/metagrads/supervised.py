"""Supervised learning: the gradient of the loss on all samples of a task, without an inner loop."""

import torch

from online_meta.batches import concat_support_query
from online_meta.functional.autodiff import outside_inference_mode, vjp
from online_meta.inner import Inner, query_loss
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def supervised(inner: Inner) -> MetaGradient:
    """Return the estimator of grad L(w; support and query together): joint training without adaptation.

    It is the gradient of *train on everything*, the baseline of Finn et al., ICML 2019, section 5.

    Args:
        inner: provides the loss; its steps are not used.

    Returns:
        A function (meta, task) -> the loss on all samples and its gradient.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = concat_support_query(task)
        with torch.no_grad():
            loss, pull = vjp(lambda meta: query_loss(inner, meta, {}, everything), meta)
            (grads,) = pull(torch.ones_like(loss))
            return MetaGrad(loss, grads)

    return outside_inference_mode(gradient)
