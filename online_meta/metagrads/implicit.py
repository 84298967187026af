"""Implicit differentiation of the fixed point that the inner loop converges to."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from online_meta.functional.autodiff import outside_inference_mode, vjp
from online_meta.functional.keyed import keyed
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import Inner, query_loss, run_inner_loop, slow_weights, step
from online_meta.metagrads._adjoint import pull_back_through_init
from online_meta.tree import add, scale, zeros
from online_meta.types import Batch, Carry, InnerRule, Meta, MetaGrad, MetaGradient, Params, Seen, Task


def implicit(inner: Inner, *, iterations: int = 20, tolerance: float = 1e-6, damping: float = 0.0) -> MetaGradient:
    """Return the estimator (meta, task) -> iMAML's meta-gradient (Rajeswaran et al., NeurIPS 2019, eq. 6).

    The inner loop runs without a graph and is assumed to end at a fixed point phi = update(phi). Conjugate gradients
    solve (I - J)^T lambda = grad f(phi), J = d update / d phi, and lambda is pulled back through the last step to the
    start, the slow weights and the rule. For ``proximal`` with strength s and the Hessian H of L this gives
    (I + H / s)^-1 grad f(phi). J must be symmetric, which holds with one learning rate for all weights. Memory does not
    depend on the number of steps; accuracy needs enough steps to come near the fixed point, which may not exist for
    networks with kinks (ReLU) if the strength is small relative to the curvature.

    Args:
        inner: an inner loop of at least 1 step whose rule pulls back to its start, e.g. ``proximal``.
        iterations: the largest number of iterations, at least 1. They end early if I - J is not positive along a
            direction.
        tolerance: relative residual at which they end, at least 0.
        damping: d, at least 0, is added to the diagonal of I - J. It bounds the solution if the curvature nearly
            cancels the pull (H near -s); ``proximal`` with learning rate l then gives (I + H / s + d / (l s) I)^-1.

    Raises:
        ValueError: if an option is out of range, ``inner`` has no step, or its rule has no such fixed point.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be at least 0, e.g. 1e-6")
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; it must be at least 0")
    if inner.steps < 1:
        raise ValueError(f"inner.steps is {inner.steps}; implicit needs at least 1 step, and usually about 20")
    if not _pulls_back(inner.rule):
        raise ValueError(
            "the inner rule does not pull back to its start, so its fixed point does not depend on it: use one "
            "that does, rules.proximal(lr, strength), or another estimator, exact or first_order"
        )

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        with torch.no_grad():
            slow = Meta(slow_weights(inner, meta.weights), meta.rule)
            carry = run_inner_loop(inner, meta, task.support)
            loss, pull = vjp(lambda slow, phi: query_loss(inner, slow, phi, task.query), slow, carry.phi)
            direct, right = pull(torch.ones_like(loss))

            def pull_back_step(adjoint: Params) -> tuple[Meta, Params, Params]:
                """Pull an adjoint of phi back through the last step to (slow weights, rule), the state and phi."""

                def step_fn(slow: Meta, state: Params, phi: Params) -> Params:
                    return step(inner, slow, Carry(phi, state), task.support, inner.steps - 1).phi

                pulled: tuple[Meta, Params, Params] = vjp(step_fn, slow, carry.state, carry.phi)[1](adjoint)
                return pulled

            adjoint = _solve(
                lambda one: _minus(scale(one, 1.0 + damping), pull_back_step(one)[2]), right, iterations, tolerance
            )
            share, state, _ = pull_back_step(adjoint)
            # The fixed point does not depend on the first phi; the start acts through the state alone.
            start = Carry(zeros(carry.phi), state)
            return MetaGrad(loss, pull_back_through_init(inner, meta, task, add(direct, share), start))

    return outside_inference_mode(gradient)


def _solve(matrix: Callable[[Params], Params], right: Params, iterations: int, tolerance: float) -> Params:
    """Solve matrix(x) = right by conjugate gradients (Hestenes & Stiefel, 1952), starting from x = right.

    The loop always runs all ``iterations``, as ``vmap`` requires; after convergence they change nothing.
    """
    found, residual = right, _minus(right, matrix(right))
    direction, size = residual, _dot(residual, residual)
    enough = tolerance**2 * _dot(right, right)
    active = torch.ones_like(size, dtype=torch.bool)
    for _ in range(iterations):
        image = matrix(direction)
        curvature = _dot(direction, image)
        active = active & (size > enough) & (curvature > 0)
        length = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        found = _step_along(found, length, direction)
        residual = _step_along(residual, -length, image)
        following = _dot(residual, residual)
        direction = _step_along(
            residual, torch.where(active, following / torch.where(active, size, 1.0), 0.0), direction
        )
        size = following
    return found


def _dot(left: Params, right: Params) -> Tensor:
    products = [(left[name] * value).sum() for name, value in right.items()]
    return torch.stack(products).sum()


def _minus(left: Params, right: Params) -> Params:
    return add(left, scale(right, -1.0))


def _step_along(start: Params, length: Tensor, direction: Params) -> Params:
    return {name: value + length * direction[name] for name, value in start.items()}


def _pulls_back(rule: InnerRule) -> bool:
    """Return whether a step with zero gradient moves towards the start from either side and keeps the state.

    Raises ``ValueError`` if the rule cannot be tried on a small task of its own, or pulls back and draws numbers.
    """
    try:
        found = _keeps_pulling_back(rule)
    except Exception as error:  # A rule that reads its support set may need one of other shapes.
        raise ValueError(
            "implicit tries the inner rule on a support set of two rows, x and y of shape (2, 2), and it raised "
            f"{type(error).__name__}: {error}; use another estimator, exact or first_order"
        ) from error
    if found and rule.random:
        raise ValueError(
            "the inner rule draws other numbers in each step, so it has no fixed point: use another estimator, exact "
            "or first_order"
        )
    return found


def _keeps_pulling_back(rule: InnerRule) -> bool:
    probe = Batch(torch.ones(2, 2), torch.ones(2, 2))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), keyed(probe, INIT_STEP, "begin"):
        weights = {"probe.weight": torch.full((2, 2), 2.0), "probe.bias": torch.full((2,), 2.0)}
        learned = rule.init(weights)
        phi, state = rule.start(learned, weights, probe)
        seen = Seen(torch.zeros(()), tree_map(torch.zeros_like, phi) if rule.sees == "gradient" else {})
        for side in (-1.0, 1.0):
            away = {name: torch.full_like(value, side) for name, value in phi.items()}
            after = rule.update(learned, Carry(add(phi, away), state), seen, 0)
            moved = _dot(_minus(after.phi, add(phi, away)), away)
            if not moved < 0 or not all(map(torch.equal, tree_flatten(after.state)[0], tree_flatten(state)[0])):
                return False
    return True
