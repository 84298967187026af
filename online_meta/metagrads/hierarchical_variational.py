"""The objective of amortised Bayesian meta-learning: the bound of a hierarchical model, with a prior of the prior."""

import math

import torch
from torch import Tensor

from online_meta.batches import concat_support_query, sum_weights
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.normals import kl_divergence
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, drawing, effective_particles
from online_meta.metagrads._adjoint import differentiate_steps, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Normal, Task

RATE = 0.01
"""The rate of the Gamma distribution of the precisions, whose shape is 1."""


def hierarchical_variational(inner: Inner, *, kl_weight: float = 1.0, hyperprior_weight: float = 0.01) -> MetaGradient:
    """Return the estimator of a task's negative evidence lower bound (Ravi & Beatson, ICLR 2019), for each sample.

    With the support set D, the query set D' and N samples in both it is

        E_q[f(theta; D + D')] + kl_weight / N KL(q || p) - hyperprior_weight / N log p(mu, log sigma).

    p = N(mu, sigma^2) is the prior with which the inner loop begins, and q what it ends with after its steps on D.
    f is the mean loss, which should be a negative log-likelihood in nats. The hyperprior of each entry of mu is
    N(0, 1), and that of each precision tau = 1 / sigma^2 is Gamma(1, 0.01). The rule learns log(sigma), whose density
    has the factor |d tau / d log sigma| = 2 tau:

        -log p(log sigma) = 0.01 tau - log tau - log 0.02,

    with its minimum at sigma = 0.1. The gradient differentiates the inner loop, and is exact for the numbers that are
    drawn by key.

    Args:
        inner: an inner loop whose rule has a ``belief``, such as ``bayes_by_gradient``. The expectation is a mean over
            its ``draws``.
        kl_weight: the weight of the divergence, at least 0. The bound holds for 1. It may differ from that of the inner
            loop.
        hyperprior_weight: the weight of the hyperprior, at least 0. It is 1 / T in the paper, for T tasks.

    Returns:
        A function (meta, task) -> the bound and its gradient.

    Raises:
        ValueError: if a weight is negative, the rule has no ``belief``, or ``inner`` begins with fresh weights.
    """
    believe = inner.rule.belief
    if believe is None:
        raise ValueError(
            "hierarchical_variational needs an inner rule that adapts a normal distribution of the weights, such as "
            "bayes_by_gradient; other rules take another estimator, such as exact"
        )
    for name, value in (("kl_weight", kl_weight), ("hyperprior_weight", hyperprior_weight)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}: it is 0 or more")
    if inner.begin != "weights":
        raise ValueError(f'a prior of the weights is learned, and with begin = "{inner.begin}" each task draws its own')

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        both = concat_support_query(task)

        def judge(slow: Meta, carry: Carry) -> Tensor:
            with drawing(inner, both, INIT_STEP, "query"):
                losses = [inner.loss(weights, both) for weights in effective_particles(inner, slow, carry.phi)]
            found, prior = believe(slow.rule, carry)
            nats = kl_weight * kl_divergence(found, prior) + hyperprior_weight * _judge_prior(prior)
            return torch.stack(losses).mean() + nats / sum_weights(both)

        return pull_back(inner, meta, task, differentiate_steps(inner, task.support), judge=judge)

    return outside_inference_mode(gradient)


def _judge_prior(prior: Normal) -> Tensor:
    """Return -log p(mu, log sigma), a scalar in nats."""
    means = [0.5 * (mean.square() + math.log(2 * math.pi)).sum() for mean in prior.mean.values()]
    log_taus = [-2.0 * log_std for log_std in prior.log_std.values()]
    return torch.stack([*means, *((RATE * one.exp() - one - math.log(2 * RATE)).sum() for one in log_taus)]).sum()
