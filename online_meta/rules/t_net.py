"""T-net: gradient descent in a meta-learned metric, with one matrix per layer."""

from online_meta.types import Carry, InnerRule, Params, Seen


def t_net(lr: float = 0.01) -> InnerRule:
    """Return the rule of T-nets: a layer computes T (W x + b), and only W and b adapt (Lee & Choi, ICML 2018, eq. 3).

    phi_{k+1} = phi_k - lr * grad L(phi_k) for phi = (W, b), so the layer's effective weight T W moves by T T^T times
    its gradient. T is meta-learned and starts as the identity. It is square with as many rows as the first dimension of
    W (output features or channels), so leave large embeddings out of ``fast``. A weight of fewer than two dimensions
    has no T, except that a bias shares the T of its layer's weight.

    Args:
        lr: inner learning rate, above 0.

    Returns:
        The rule; it learns the matrices T.

    Raises:
        ValueError: if ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=identities,
        start=lambda rule, phi, support: Carry(phi, {}),
        update=update,
        view=transform,
    )


def identities(weights: Params) -> Params:
    """Return the initial T, an identity, for every weight of two or more dimensions, by the weight's name."""
    return {name: w.new_ones(len(w)).diag() for name, w in weights.items() if w.ndim >= 2}


def transform(rule: Params, weights: Params) -> Params:
    """Replace W by T W and b by T b wherever ``rule`` has a T; return all weights."""
    seen = dict(weights)
    for name, weight in weights.items():
        if (owner := owner_of(name)) in rule:
            seen[name] = (rule[owner] @ weight.reshape(len(weight), -1)).reshape(weight.shape)
    return seen


def owner_of(name: str) -> str:
    """Return the name of the weight whose T is used: ``head.weight`` for ``head.weight`` and ``head.bias``."""
    layer, dot, leaf = name.rpartition(".")
    return f"{layer}{dot}{leaf.replace('bias', 'weight')}"
