"""PLATIPUS: draw the initialisation from a prior that the support set has moved, then descend."""

import math

from online_meta.batches import count_samples
from online_meta.functional.normals import LOG_STD, draw_normal, require_log_std
from online_meta.types import Batch, Carry, Infer, Inference, InnerRule, Normal, Params, Seen

PRIOR, POSTERIOR = "prior", "posterior"


def platipus(lr: float = 0.01, log_std: float = -4.0) -> InnerRule:
    """Return the rule theta ~ N(mu - gamma_p grad L(mu), sigma^2), phi_{k+1} = phi_k - lr * grad L(phi_k) from theta.

    It is test time of PLATIPUS (Finn, Xu & Levine, NeurIPS 2018, algorithm 2). mu are the meta-learned weights, and
    step 0 draws theta = mu - gamma_p grad L(mu) + sigma eps by key. All further steps are gradient descent. Without
    support samples, ``start`` draws from N(mu, sigma^2). Each draw is one sample of the belief, so use it with the
    posterior "samples".

    Training draws theta from q = N(mu - gamma_q grad L'(mu), v_q) instead, with L' the query loss (algorithm 1): use
    the estimator ``variational``. The rates gamma_p and gamma_q are learned by their logarithms, so that they stay
    positive, and sigma and the root of v_q by theirs, one for each entry.

    Args:
        lr: inner learning rate, above 0, and the initial gamma_p and gamma_q.
        log_std: initial value of log(sigma) and log(v_q) / 2, in -20 to 20.

    Returns:
        The rule; it needs one inner step or more.

    Raises:
        ValueError: if an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    require_log_std(log_std=log_std)

    def init(weights: Params) -> Params:
        some = next(iter(weights.values()))
        found = {}
        for part in (PRIOR, POSTERIOR):
            found[f"{part}.log_rate"] = some.new_full((), math.log(lr))
            found |= {
                f"{part}.{name}{LOG_STD}": weight.new_full(weight.shape, log_std) for name, weight in weights.items()
            }
        return found

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry(phi if count_samples(support) else draw_normal(prior(rule, phi, support, {})), {})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        if step == 0:
            return Carry(draw_normal(_move(PRIOR, rule, carry.phi, seen.grads)), carry.state)
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    prior, posterior = _infer(PRIOR), _infer(POSTERIOR)
    return InnerRule(
        init=init,
        start=start,
        update=update,
        view=lambda rule, weights: weights,
        random="keyed",
        infer=Inference(prior, posterior, evidence="query", sees="gradient"),
    )


def _infer(part: str) -> Infer:
    return lambda rule, phi, batch, grads: _move(part, rule, phi, grads)


def _move(part: str, rule: Params, phi: Params, grads: Params) -> Normal:
    """Return N(phi - gamma grads, std^2) with the rate and the deviations of a part of the rule; no grads are zeros."""
    rate = rule[f"{part}.log_rate"].exp()
    mean = {name: value - rate * grads[name] for name, value in phi.items()} if grads else phi
    return Normal(mean, {name: rule[f"{part}.{name}{LOG_STD}"] for name in phi})
