"""The exact second-order meta-gradient."""

from collections.abc import Sequence

from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import Inner
from online_meta.metagrads._adjoint import (
    differentiate_steps,
    pull_back,
    require_cut,
    require_query_chunk,
    require_step_weights,
)
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def exact(
    inner: Inner,
    *,
    rematerialise: bool = False,
    offload: bool = False,
    step_weights: Sequence[float] | None = None,
    cut: int | None = None,
    query_chunk: int | None = None,
) -> MetaGradient:
    """Return the estimator of d f(U(w)) / dw, exact to rounding (MAML: Finn et al., ICML 2017, eq. 1).

    It differentiates all of phi_{k+1} = update(phi_k, grad L(phi_k)), so the adjoint of an SGD step is
    (I - lr H_k) lambda. The memory is one step's graph and the trajectory phi_0..phi_K. The gradient of the rule's own
    parameters is exact too.

    Args:
        inner: the inner loop of K steps.
        rematerialise: store about 2 sqrt(K) points of the trajectory instead of K, for one more pass through the loop.
        offload: store the trajectory in host memory if the task is on a GPU; the result has the same bits.
        step_weights: v_1..v_K, not negative and not all 0: the loss is then sum_k v_k f(phi_k), the multi-step loss of
            MAML++ (Antoniou et al., ICLR 2019, section 4). None for f(phi_K).
        cut: n, at least 1: phi and the rule's state are held constant before steps n, 2n, ..., counted from 0, so that
            a loss is differentiated through n steps at most (truncated back-propagation: Williams & Peng, 1990). Use it
            with ``step_weights`` to train learned optimizers over long inner loops. None for the exact gradient.
        query_chunk: the largest number of query samples, at least 1, whose graph is held at once. The gradient is
            exact for any loss; most samples are computed forward twice. It needs a loss of ``om.model_loss``, and a
            model that computes each sample by itself, so not batch normalisation. None for all samples at once.

    Returns:
        A function (meta, task) -> the query loss and its gradient.

    Raises:
        ValueError: if there are not K ``step_weights``, one is negative or all are 0, if ``cut`` is below 1, or if the
            query set cannot be computed in chunks.
    """
    weights = None if step_weights is None else require_step_weights(step_weights, inner.steps)
    require_cut(cut)
    require_query_chunk(inner, query_chunk)

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        return pull_back(
            inner,
            meta,
            task,
            differentiate_steps(inner, task.support),
            rematerialise=rematerialise,
            offload=offload,
            weights=weights,
            cut=cut,
            query_chunk=query_chunk,
        )

    return outside_inference_mode(gradient)
