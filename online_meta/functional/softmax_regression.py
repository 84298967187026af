"""Softmax regression with a quadratic penalty, by Newton's method in float64."""

import torch
from torch import Tensor

NEWTON_STEPS = 20
"""The largest number of Newton steps; from any start, 5 to 8 are needed."""

CG_STEPS = 30
"""The largest number of conjugate gradients of a Newton step."""

HALVINGS = 30
"""How often a Newton step may be halved."""

PRECISE = 1e-9
"""The largest entry of the gradient at which the search ends, as a share of what all targets could make it."""


def fit_softmax_regression(
    rows: Tensor, targets: Tensor, weight: Tensor, offset: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """Return argmin_W sum_i w_i nll(softmax(z_i W + o_i), y_i) + strength / 2 |W|^2.

    It is found by Newton's method, whose steps are solved by conjugate gradients and halved until the loss is smaller
    (Nash, SIAM J. Numer. Anal. 1984). The rows are turned to their principal axes first: W is a combination of at most
    min(n, d) of them, and there the preconditioner is diagonal. The result depends on the arguments alone.

    Args:
        rows: z, (n, d) in float64.
        targets: y, the probabilities of the classes, (n, classes).
        weight: w, (n,), at least 0.
        offset: o, logits (n, classes) that are added; None for zeros.
        strength: of the penalty, above 0.

    Returns:
        W (d, classes); zeros without rows, NaN for rows that are not finite.
    """
    classes = targets.shape[1]
    if not len(rows):
        return rows.new_zeros(rows.shape[1], classes)
    offset = torch.zeros_like(targets) if offset is None else offset
    scaled = weight.sqrt()[:, None] * rows
    if not (scaled.square().sum().isfinite() and offset.isfinite().all()):
        return rows.new_full((rows.shape[1], classes), torch.nan)
    axes, squares = _find_axes(scaled)
    z = rows @ axes
    fitted = _minimise(z, squares, targets, weight[:, None], offset, strength)
    return axes @ fitted


def curvature_of(probabilities: Tensor) -> Tensor:
    """Return the number c for which c (I - 1 1'/C) has the trace of the Hessian diag(p) - p p', (n,), for p (n, C).

    For two classes, and at equal probabilities of any number, the two are the same matrix.
    """
    return (1 - probabilities.square().sum(1)) / max(probabilities.shape[1] - 1, 1)


def _find_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal axes of the rows, orthonormal (d, r), and the sums of squares along them, (r,)."""
    if len(rows) < rows.shape[1]:
        squares, left = torch.linalg.eigh(rows @ rows.T)
        kept = squares > squares[-1] * len(rows) * torch.finfo(rows.dtype).eps
        return (rows.T @ left[:, kept]) / squares[kept].sqrt(), squares[kept]
    squares, axes = torch.linalg.eigh(rows.T @ rows)
    return axes, squares.clamp(min=0)


def _minimise(z: Tensor, squares: Tensor, targets: Tensor, weight: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Return the coefficients (r, classes) of the principal components ``z`` (n, r)."""
    fitted = z.new_zeros(z.shape[1], targets.shape[1])
    enough = PRECISE * float(weight.T @ z.norm(dim=1) + strength)

    def evaluate(at: Tensor) -> tuple[Tensor, float]:
        log_p = (z @ at + offset).log_softmax(1)
        return log_p, float(strength / 2 * at.square().sum() - (weight * targets * log_p).sum())

    log_p, loss = evaluate(fitted)
    for _ in range(NEWTON_STEPS):
        p = log_p.exp()
        gradient = z.T @ (weight * (p * targets.sum(1, keepdim=True) - targets)) + strength * fitted
        if float(gradient.abs().amax()) <= enough:
            break
        step = _solve_newton(z, squares, p, weight * targets.sum(1, keepdim=True), gradient, strength)
        for _ in range(HALVINGS):
            tried, tried_loss = evaluate(fitted - step)
            if tried_loss <= loss:
                break
            step = step / 2
        else:
            break  # What is left is rounding.
        fitted, log_p, loss = fitted - step, tried, tried_loss
    return fitted


def _solve_newton(z: Tensor, squares: Tensor, p: Tensor, weight: Tensor, gradient: Tensor, strength: float) -> Tensor:
    """Return about H^{-1} gradient, by preconditioned conjugate gradients; any number of them descends."""
    inner_weight = weight * p
    typical = float((weight * curvature_of(p)[:, None]).sum() / weight.sum())
    scale = 1 / (typical * squares + strength)[:, None]
    solution, rest = torch.zeros_like(gradient), gradient
    near = scale * rest
    direction, product = near, float((rest * near).sum())
    enough = product * 1e-4
    for _ in range(CG_STEPS):
        change = z @ direction
        curved = z.T @ (inner_weight * (change - (p * change).sum(1, keepdim=True))) + strength * direction
        length = product / float((direction * curved).sum())
        solution, rest = solution + length * direction, rest - length * curved
        near = scale * rest
        before, product = product, float((rest * near).sum())
        if product <= enough:
            break
        direction = near + product / before * direction
    return solution
