"""MetaOptNet with logistic regression: the head of the model is the regularised logistic regression of its features."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.functional.autodiff import is_transformed
from online_meta.functional.softmax_regression import fit_softmax_regression
from online_meta.rules._head import LOG_SCALE, LOG_STRENGTH, add_constant, as_head, require_positive, rule_of_head
from online_meta.types import HeadSamples, HeadSolver, InnerRule, LinearHead, Params

LARGEST = 4096
"""The largest number of unknowns of a Newton step, 128 MiB of second derivatives."""

LENGTHS = (1.0, 0.5, 0.25, 0.125, 1 / 32, 1 / 128, 0.0)
"""The lengths of a Newton step that are tried; the best one is taken."""

DIFFERENTIATED = 2
"""The Newton steps at the end that are differentiated."""


def logistic_head(lr: float = 0.01, strength: float = 1.0, newton_steps: int = 12) -> InnerRule:
    """Return the rule in which phi_0 has the logistic regression of the features as its head.

    The head is c W with W = argmin_W sum_i w_i nll(z_i W, y_i) + strength / 2 |W|^2: a convex learner on the features,
    as in MetaOptNet (Lee et al., CVPR 2019, section 3.1), with the likelihood in place of the hinge loss. Here z_i are
    the features of support sample i, with a constant 1 if the head has a bias, w_i is the weight of the sample, and y_i
    its class, or its labels, each of which has a regression of its own. The strength and the scale c, which starts at
    1, are meta-learned by their logarithms. Steps of gradient descent follow, so ``steps = 0`` is the plain regression.
    Without support samples, the head is that of the meta-parameters.

    W is found by Newton's method from 0; each step has the best of a few lengths. It is differentiated implicitly: the
    steps are constants, but for two more at the end. At the minimum W*, a Newton step W - H(W)^-1 g(W) has the
    derivative -H^-1 dg of the minimum itself (implicit function theorem), and two have its second derivative, too. Its
    error is that of W.

    Args:
        lr: inner learning rate of the steps, above 0.
        strength: initial strength of the penalty, above 0, in squared units of the features.
        newton_steps: steps of Newton's method before the two that are differentiated, at least 1.

    Returns:
        The rule; it learns log(strength) and log(c). With n samples, d features (the constant counted) and k outputs,
        its head has min(n, d) k unknowns. With more than 4096 it is found by conjugate gradients, for classes alone and
        without derivatives: it then answers, and a meta-gradient raises ``ValueError``.

    Raises:
        ValueError: if an option is out of range.
    """
    require_positive(strength=strength)
    if newton_steps < 1:
        raise ValueError(f"newton_steps is {newton_steps}: Newton's method takes 1 step or more")

    def solve(rule: Params, samples: HeadSamples, given: LinearHead) -> LinearHead:
        rows = add_constant(samples.features, given)
        # A minimum lies in the span of the samples; with fewer samples than features, look for its coordinates there.
        dual = len(rows) < rows.shape[1]
        known = min(rows.shape) * samples.targets.shape[1]
        strength = rule[LOG_STRENGTH].double().exp()
        if known > LARGEST:
            found = _fit_without_gradient(rows, samples, strength)
        else:
            found = _minimise(rows @ rows.T if dual else rows, dual, samples, strength, newton_steps)
            found = rows.T @ found if dual else found
        return as_head(rule[LOG_SCALE].double().exp() * found, given)

    head = HeadSolver(solve, ("classes", "labels"))
    return rule_of_head(head, lr, **{LOG_STRENGTH: math.log(strength), LOG_SCALE: 0.0})


def _fit_without_gradient(rows: Tensor, samples: HeadSamples, strength: Tensor) -> Tensor:
    """Return W of many unknowns. Raises ``ValueError`` where it is differentiated or vectorised, and for labels."""
    differentiated = torch.is_grad_enabled() and (rows.requires_grad or strength.requires_grad)
    if differentiated or is_transformed() or samples.kind != "classes":
        raise ValueError(
            f"logistic_head has {len(rows)} samples, {rows.shape[1]} features and {samples.targets.shape[1]} outputs: "
            f"the smaller of the first two numbers, times the outputs, may be {LARGEST} at most for labels and for "
            "meta-gradients; choose ridge_head"
        )
    return fit_softmax_regression(rows, samples.targets, samples.weight, strength=float(strength))


def _minimise(design: Tensor, dual: bool, samples: HeadSamples, strength: Tensor, steps: int) -> Tensor:
    """Return the coordinates V (m, k) of the minimum, whose logits are D V for the ``design`` D (n, m).

    The penalty is strength / 2 tr(V' P V), where P is the identity, or D itself (n, n) if the problem is ``dual``.
    """
    found = design.new_zeros(design.shape[1], samples.targets.shape[1])
    fixed, fixed_strength = design.detach(), strength.detach()
    fixed_samples = samples._replace(features=samples.features.detach())
    with torch.no_grad():
        for _ in range(steps):
            direction = _newton_step(fixed, dual, fixed_samples, fixed_strength, found)
            tried = torch.stack([found + length * direction for length in LENGTHS])
            best = _objective(fixed, dual, fixed_samples, fixed_strength, tried).argmin()
            found = tried.index_select(0, best[None])[0]
    for _ in range(DIFFERENTIATED):
        found = found + _newton_step(design, dual, samples, strength, found)
    return found


def _objective(design: Tensor, dual: bool, samples: HeadSamples, strength: Tensor, tried: Tensor) -> Tensor:
    """Return what is minimised at several coordinates (number, m, k), as (number,)."""
    logits = design @ tried
    if samples.kind == "classes":
        rows = samples.targets.sum(1) * logits.logsumexp(2) - (samples.targets * logits).sum(2)
    else:
        rows = (F.softplus(logits) - samples.targets * logits).sum(2)
    penalty = (tried * (logits if dual else tried)).sum((1, 2))
    return rows @ samples.weight + strength / 2 * penalty


def _newton_step(design: Tensor, dual: bool, samples: HeadSamples, strength: Tensor, found: Tensor) -> Tensor:
    """Return the step -H^-1 g of the coordinates ``found``.

    With the curvature C of the likelihood in the logits and its slope r, H = D'C D + strength P and g = D'r + strength
    P V. If D is symmetric and P = D, a factor D of both is left out.
    """
    logits, mass = design @ found, samples.weight[:, None]
    if samples.kind == "classes":
        share, mass = logits.softmax(1), mass * samples.targets.sum(1, keepdim=True)
        spread, own = share, mass * share
    else:
        share = logits.sigmoid()
        spread, own = None, mass * share * (1 - share)
    slope = mass * share - samples.weight[:, None] * samples.targets
    hessian = (_curve_in_span if dual else _curve)(design, own, spread, mass)
    matrix = hessian.flatten(2).flatten(0, 1)
    gradient = (slope if dual else design.T @ slope) + strength * found
    step: Tensor = torch.linalg.solve(matrix + strength * torch.eye(len(matrix)).to(matrix), gradient.reshape(-1))
    return -step.reshape(found.shape)


def _curve(design: Tensor, own: Tensor, spread: Tensor | None, mass: Tensor) -> Tensor:
    """Return D'C D, (m, k, m, k), where row i of C is diag(own_i) - mass_i spread_i spread_i'."""
    blocks = (design.T * own.T[:, None, :]) @ design
    hessian = torch.diag_embed(blocks.permute(1, 2, 0)).transpose(1, 2)
    if spread is None:
        return hessian
    wide = (design[:, :, None] * spread[:, None, :]).flatten(1)
    return hessian - ((mass * wide).T @ wide).reshape(hessian.shape)


def _curve_in_span(design: Tensor, own: Tensor, spread: Tensor | None, mass: Tensor) -> Tensor:
    """Return C D, (n, k, n, k), for a symmetric D (n, n)."""
    curvature = torch.diag_embed(own)
    if spread is not None:
        curvature = curvature - mass[:, :, None] * spread[:, :, None] * spread[:, None, :]
    return curvature[:, :, None, :] * design[:, None, :, None]
