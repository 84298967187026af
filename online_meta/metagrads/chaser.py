"""The chaser loss: the end of the inner loop is to be where further steps on all samples lead."""

import torch
from torch import Tensor

from online_meta.batches import concat_support_query
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import Inner, step
from online_meta.metagrads._adjoint import differentiate_steps, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def chaser(inner: Inner, *, steps: int = 1) -> MetaGradient:
    """Return the estimator of the gradient of sum_m |theta_m^K - theta_m^{K+s}|^2 (Yoon et al., NeurIPS 2018).

    The leader theta^{K+s} makes s further steps from theta^K, on support and query together. It is held constant. The
    sum is over all particles of ``svgd``, as in Bayesian MAML; a rule without particles has one. The loss is a squared
    distance of weights, which is small at first: a step of ``lr`` = 1e-3 gives some 1e-6. So step by Adam.

    Args:
        inner: the inner loop of K steps.
        steps: the leader's further steps s, at least 1.

    Returns:
        A function (meta, task) -> the chaser loss, which is no query loss, and its gradient.

    Raises:
        ValueError: if ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: the leader makes 1 step or more")

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        everything = concat_support_query(task)

        def judge(slow: Meta, carry: Carry) -> Tensor:
            with torch.no_grad():
                leader = carry
                for k in range(inner.steps, inner.steps + steps):
                    leader = step(inner, slow, leader, everything, k)
            gaps = [(value - leader.phi[name]).square().sum() for name, value in carry.phi.items()]
            return torch.stack(gaps).sum()

        return pull_back(inner, meta, task, differentiate_steps(inner, task.support), judge=judge)

    return outside_inference_mode(gradient)
