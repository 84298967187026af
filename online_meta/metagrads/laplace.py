"""The meta-gradient of LLAMA: the query loss after adaptation, and how sharply the support set determines it."""

from torch import Tensor

from online_meta.batches import sum_weights
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.curvature import Curvature, compute_precision, require_fit, require_options
from online_meta.inner import Inner, query_loss
from online_meta.metagrads._adjoint import differentiate_steps, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def laplace(
    inner: Inner, *, eta: float = 1e-3, curvature: Curvature = "full", strength: float | None = None
) -> MetaGradient:
    """Return the estimator of d [f(phi_K) + eta / (2 n') log det H(phi_K)] / dw (LLAMA: Grant et al., ICLR 2018).

    f is the mean query loss of n' samples, so n' times the bracket is the negative logarithm of Laplace's approximation
    to the marginal likelihood, with the determinant weighted by eta. H is the precision of the posterior ``laplace``
    with the same options, on the support set. The gradient is exact: it differentiates the inner loop and H.

    Args:
        inner: the inner loop of K steps, with a loss of ``om.model_loss``.
        eta: the weight of the determinant, at least 0; with 0 this is ``exact``.
        curvature: as of the posterior ``laplace``.
        strength: as of the posterior ``laplace``; leave it out with ``proximal``, whose own it then is.

    Returns:
        A function (meta, task) -> the bracket and its gradient.

    Raises:
        ValueError: if an option is out of range, the rule has particles, the curvature of the loss is not known, or
            there is a ``strength`` beside that of the rule.
    """
    require_options(curvature, strength)
    if not eta >= 0:
        raise ValueError(f"eta is {eta}: the determinant has a weight of 0 or more")
    require_fit(inner, strength)

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def judge(slow: Meta, carry: Carry) -> Tensor:
            loss = query_loss(inner, slow, carry.phi, task.query)
            if not eta:
                return loss
            log_det = compute_precision(inner, slow, carry.phi, task.support, curvature, strength).log_det()
            return loss + (eta / 2 * log_det / sum_weights(task.query)).to(loss.dtype)

        return pull_back(inner, meta, task, differentiate_steps(inner, task.support), judge=judge)

    return outside_inference_mode(gradient)
