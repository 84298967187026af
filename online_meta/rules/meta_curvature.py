"""Meta-Curvature: transform gradients by learned matrices, one for each dimension of a weight."""

import math

from torch import Tensor

from online_meta.types import Carry, InnerRule, Params, Seen

MODES = ("out", "in", "filter")


def meta_curvature(lr: float = 0.01) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - lr MC(grad L(phi_k)) (Park & Oliva, NeurIPS 2019, section 3).

    MC(G) = G x_1 M_out x_2 M_in x_3 M_filter, products along the output, input and (flattened) kernel dimensions of G.
    A linear weight has no M_filter; a bias or scale has only M_out. The matrices are meta-learned and start as
    identities, which is gradient descent. They are square, so leave large embeddings out of ``fast``.

    Args:
        lr: inner learning rate, above 0.

    Returns:
        The rule; it learns up to three matrices for each weight.

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def init(weights: Params) -> Params:
        return {
            f"{name}.{mode}": weight.new_ones(size).diag()
            for name, weight in weights.items()
            for mode, size in zip(MODES, _sizes(weight)[: max(weight.ndim, 1)], strict=False)
        }

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        moved = {name: phi - lr * _transform(rule, name, seen.grads[name]) for name, phi in carry.phi.items()}
        return Carry(moved, carry.state)

    return InnerRule(
        init=init,
        start=lambda rule, phi, support: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
    )


def _sizes(weight: Tensor) -> tuple[int, int, int]:
    """Return a weight's numbers of outputs, inputs and kernel entries; 1 for a dimension that it does not have."""
    outputs, inputs, *kernel = (*weight.shape, 1, 1)[: max(weight.ndim, 2)]
    return outputs, inputs, math.prod(kernel)


def _transform(rule: Params, name: str, grad: Tensor) -> Tensor:
    """Return MC(G) for the gradient of the weight ``name``."""
    whole = grad.reshape(_sizes(grad))
    for dimension, mode in enumerate(MODES):
        if (matrix := rule.get(f"{name}.{mode}")) is not None:
            whole = (matrix @ whole.movedim(dimension, -2)).movedim(-2, dimension)
    return whole.reshape(grad.shape)
