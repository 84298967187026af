"""T-net: gradient descent in a learned metric, one matrix a layer."""

from online_meta.types import Carry, InnerRule, Params


def t_net(lr: float = 0.01) -> InnerRule:
    """Return the rule of T-nets: a layer computes T (W x + b), and W, b alone adapt (Lee & Choi, ICML 2018, eq. 3).

    phi_{k+1} = phi_k - lr * grad L(phi_k) for phi = (W, b), so that the layer's own weight T W moves by T T^T times
    its gradient. T, learned, is square with as many rows as W (its first dimension: a convolution's output channels)
    and starts as the identity; an embedding of many words is better left out of ``fast``. A weight of fewer than two
    dimensions has no T, but for the bias next to a weight that has. ``lr`` is a positive float.
    Raises ``ValueError`` when it is not.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        return Carry({name: phi - lr * grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=identities,
        start=lambda rule, phi: Carry(phi, {}),
        update=update,
        view=transform,
    )


def identities(weights: Params) -> Params:
    """Return T = 1 for every weight of two or more dimensions, under its name."""
    return {name: w.new_ones(len(w)).diag() for name, w in weights.items() if w.ndim >= 2}


def transform(rule: Params, weights: Params) -> Params:
    """Return the weights with T W for W and T b for b where ``rule`` has a T."""
    seen = dict(weights)
    for name, weight in weights.items():
        if (owner := owner_of(name)) in rule:
            seen[name] = (rule[owner] @ weight.reshape(len(weight), -1)).reshape(weight.shape)
    return seen


def owner_of(name: str) -> str:
    """Return the name of the weight whose T a weight shares: ``head.weight`` for ``head.weight`` and ``head.bias``."""
    layer, dot, leaf = name.rpartition(".")
    return f"{layer}{dot}{leaf.replace('bias', 'weight')}"
