"""Prototypical networks: the head of the model compares features with the mean features of each class."""

import torch

from online_meta.rules._head import LOG_SCALE, rule_of_head
from online_meta.types import HeadSamples, HeadSolver, InnerRule, LinearHead, Params

MISSING = 20.0
"""How far the logit of a class without support samples lies below that of a class at the mean of all features."""


def nearest_centroid(lr: float = 0.01) -> InnerRule:
    """Return the rule whose logit of class c is -s |f - m_c|^2, with the mean features m_c of the class's samples.

    It is the head of prototypical networks (Snell et al., NeurIPS 2017, section 2.4). Up to the term -s |f|^2, which
    all classes share, it is linear in the features f: phi_0 has the head with weight 2 s m_c and bias -s |m_c|^2. The
    scale s is meta-learned by its logarithm and starts at 1. A class without support samples has a logit 20 below that
    of a class whose mean is that of all samples. Steps of gradient descent follow, so ``steps = 0`` is the plain
    nearest centroid. Without support samples, the head is that of the meta-parameters.

    Args:
        lr: inner learning rate of the steps, above 0.

    Returns:
        The rule; it learns log(s).

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    return rule_of_head(HeadSolver(_solve, ("classes",)), lr, **{LOG_SCALE: 0.0})


def _solve(rule: Params, samples: HeadSamples, given: LinearHead) -> LinearHead:
    if given.bias is None:
        raise ValueError("nearest_centroid needs a head with a bias: make it nn.Linear(..., bias=True)")
    scale = rule[LOG_SCALE].double().exp()
    shares = samples.weight[:, None] * samples.targets
    counts = shares.sum(0)[:, None]
    found = counts > 0
    mean = shares.sum(1) @ samples.features / torch.where(found.any(), counts.sum(), 1.0)
    centroids = torch.where(found, shares.T @ samples.features / torch.where(found, counts, 1.0), mean)
    bias = -scale * (centroids**2).sum(1)
    return LinearHead(2 * scale * centroids, torch.where(found[:, 0], bias, bias - MISSING))
