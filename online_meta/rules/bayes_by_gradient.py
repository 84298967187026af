"""Amortised Bayesian meta-learning: adapt the mean and the deviation of every weight by variational inference."""

from online_meta.functional.normals import LOG_STD, draw_normal, require_log_std
from online_meta.types import Batch, Carry, InnerRule, Normal, Params, Seen


def bayes_by_gradient(lr: float = 0.01, log_std: float = -3.0, kl_weight: float = 1.0, draws: int = 1) -> InnerRule:
    """Return the rule that descends E_q[L(theta)] + kl_weight / n KL(q || p) (ABML: Ravi & Beatson, ICLR 2019).

    q = N(m, s^2) and the prior p = N(mu, sigma^2) have independent entries; mu are the meta-learned weights, and the
    rule learns log(sigma). q starts as p. A step draws theta = m + s eps by key, takes g = d L(theta) / d (m, log s):

        m' = (m - lr g_m + c mu) / (1 + c),    c = lr kl_weight / (n sigma^2)
        log s' = log s - lr (g_s + kl_weight / n (s^2 / sigma^2 - 1))

    L is the mean loss of n support samples, which should be a negative log-likelihood in nats: the objective is then
    1 / n of the paper's. The divergence is in closed form. Its part in m is taken at m', so that no sigma makes the
    steps diverge; the paper's gradient at m differs in second order of lr, and has the same fixed point. phi has m
    under the names of the weights, and log s under ``NAME.log_std``. The model is called with a draw of theta. Use the
    posterior "samples", and the estimator ``exact``, for the query loss of draws, or ``hierarchical_variational``.

    Args:
        lr: inner learning rate, above 0.
        log_std: initial log(sigma), in -20 to 20. The smaller it is, the less weights move.
        kl_weight: the weight of the divergence, at least 0. With 0 and a small deviation, the rule is ``sgd``.
        draws: the draws of theta, at least 1, that a step averages; a query loss is that of the mixture of as many.

    Returns:
        The rule.

    Raises:
        ValueError: if an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    require_log_std(log_std=log_std)
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight is {kl_weight}: it is 0 or more, and 1 for the bound itself")
    if draws < 1:
        raise ValueError(f"draws is {draws}: it is 1 or more")

    def init(weights: Params) -> Params:
        return {_name_spread(name): weight.new_full(weight.shape, log_std) for name, weight in weights.items()}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry({**phi, **{name: rule[name] for name in map(_name_spread, phi)}}, phi)

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        share, moved = lr * kl_weight / seen.size, dict(carry.phi)
        for name, mean in carry.state.items():
            spread = _name_spread(name)
            pull = share * (-2.0 * rule[spread]).exp()
            moved[name] = (carry.phi[name] - lr / draws * seen.grads[name] + pull * mean) / (1.0 + pull)
            ratio = (2.0 * (carry.phi[spread] - rule[spread])).exp()
            moved[spread] = carry.phi[spread] - lr / draws * seen.grads[spread] - share * (ratio - 1.0)
        return Carry(moved, carry.state)

    return InnerRule(
        init=init,
        start=start,
        update=update,
        view=_draw_weights,
        random="keyed",
        particles=None if draws == 1 else lambda rule, weights: [_draw_weights(rule, weights) for _ in range(draws)],
        belief=_split_belief,
    )


def _name_spread(name: str) -> str:
    return f"{name}{LOG_STD}"


def _split_belief(rule: Params, carry: Carry) -> tuple[Normal, Normal]:
    """Return q and p, the prior."""
    spreads = {name: _name_spread(name) for name in carry.state}
    found = Normal({name: carry.phi[name] for name in spreads}, {n: carry.phi[one] for n, one in spreads.items()})
    return found, Normal(carry.state, {name: rule[one] for name, one in spreads.items()})


def _draw_weights(rule: Params, weights: Params) -> Params:
    """Draw the weights that have a deviation; leave out the names of the deviations."""
    means = {name: value for name, value in weights.items() if not name.endswith(LOG_STD)}
    adapted = {name: value for name, value in means.items() if _name_spread(name) in weights}
    if not adapted:
        return means
    return {**means, **draw_normal(Normal(adapted, {name: weights[_name_spread(name)] for name in adapted}))}
