"""R2-D2: the head of the model is the ridge regression of the support set on its features."""

import math

import torch
from torch import Tensor

from online_meta.rules._head import LOG_SCALE, LOG_STRENGTH, add_constant, as_head, require_positive, rule_of_head
from online_meta.types import HeadSamples, HeadSolver, InnerRule, LinearHead, Params


def ridge_head(lr: float = 0.01, strength: float = 1.0, temperature: float = 0.2) -> InnerRule:
    """Return the rule of R2-D2: phi_0 has the ridge regression as its head (Bertinetto et al., ICLR 2019, section 3.2).

    The head is c W with W = argmin_W sum_i w_i |z_i W - y_i|^2 + strength |W|^2. Here z_i are the features of support
    sample i, with a constant 1 if the head has a bias, w_i is the weight of the sample, and y_i its target: one-hot
    classes, labels of 1 and -1, or numbers. The strength and the scale c are meta-learned by their logarithms. The
    solution is in closed form, and meta-gradients pass through it exactly. Steps of gradient descent follow, so
    ``steps = 0`` is the plain regression. Without support samples, the head is that of the meta-parameters.

    Args:
        lr: inner learning rate of the steps, above 0.
        strength: initial strength of the penalty, above 0, in squared units of the features.
        temperature: initial 1 / c for classes and labels, above 0. z W estimates probabilities, so that the logits of
            two classes far from each other would differ by 1 without it. For numbers, c starts at 1.

    Returns:
        The rule; it learns log(strength), and log(c) relative to its initial value.

    Raises:
        ValueError: if an option is out of range.
    """
    require_positive(strength=strength, temperature=temperature)

    def solve(rule: Params, samples: HeadSamples, given: LinearHead) -> LinearHead:
        root = samples.weight.sqrt()[:, None]
        targets = 2 * samples.targets - 1 if samples.kind == "labels" else samples.targets
        rows = root * add_constant(samples.features, given)
        weights = _solve_ridge(rows, root * targets, rule[LOG_STRENGTH].double().exp())
        scale = rule[LOG_SCALE].double().exp() / (1.0 if samples.kind == "numbers" else temperature)
        return as_head(scale * weights, given)

    head = HeadSolver(solve, ("classes", "labels", "numbers"))
    return rule_of_head(head, lr, **{LOG_STRENGTH: math.log(strength), LOG_SCALE: 0.0})


def _solve_ridge(rows: Tensor, targets: Tensor, strength: Tensor) -> Tensor:
    """Return argmin_W |Z W - Y|^2 + strength |W|^2, (d, k), for Z (n, d) and Y (n, k).

    It is (Z'Z + strength I)^-1 Z'Y = Z' (Z Z' + strength I)^-1 Y, of which the smaller matrix is solved.
    """
    dual = len(rows) < rows.shape[1]
    squares, right = (rows @ rows.T, targets) if dual else (rows.T @ rows, rows.T @ targets)
    solution: Tensor = torch.linalg.solve(squares + strength * torch.eye(len(squares)).to(squares), right)
    return rows.T @ solution if dual else solution
