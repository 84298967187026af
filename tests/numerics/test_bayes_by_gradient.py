"""ABML: its fixed point is the best normal belief with independent entries, and its limit is MAML."""

import math

import pytest
import torch

import online_meta as om
from online_meta.functional.keyed import keyed, normal_like
from online_meta.inner import run_inner_loop, see_support
from online_meta.testing.compare import relative_error
from tests.numerics.linear_gaussian import NOISE, PRIOR, draw_sigma_points, setting
from tests.numerics.problems import problem


@pytest.mark.parametrize("doubled", [False, True], ids=["samples", "weights of 2"])
def test_the_fixed_point_is_the_mean_of_the_posterior_and_the_inverse_of_its_precision(monkeypatch, doubled):
    """Of all normal distributions with independent entries, this one is nearest (Bishop, 2006, eq. 10.15)."""
    x = torch.tensor([[1.0, 0.3], [0.2, -0.9], [0.5, 0.8], [-1.1, 0.1]], dtype=torch.float64)
    draws = draw_sigma_points(monkeypatch, 2)
    rule = om.rules.bayes_by_gradient(lr=1.0, log_std=math.log(PRIOR), draws=draws)
    inner, weights, y = setting(x, rule, 100)
    meta = inner.init(weights)
    phi = run_inner_loop(inner, meta, om.Batch(x, y, torch.full((4,), 2.0).double() if doubled else None)).phi
    times = 2 if doubled else 1
    precision = times * x.T @ x / NOISE**2 + torch.eye(2, dtype=torch.float64) / PRIOR**2
    mean = torch.linalg.solve(precision, times * x.T @ y / NOISE**2 + weights["weight"].T / PRIOR**2)
    torch.testing.assert_close(phi["weight"], mean.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((-2 * phi["weight.log_std"]).exp(), precision.diag()[None], rtol=1e-10, atol=0)


def test_a_step_sees_the_gradient_of_a_draw():
    """By m it is grad L(theta), and by log s it is grad L(theta) s eps, at theta = m + s eps."""
    x = torch.randn(4, 2, dtype=torch.float64)
    inner, weights, y = setting(x, om.rules.bayes_by_gradient(log_std=-1.0), 1)
    meta, batch = inner.init(weights), om.Batch(x, y)
    phi = {**meta.weights, **meta.rule}
    with torch.no_grad():
        seen = see_support(inner, meta, phi, batch, 0)
    with keyed(batch, 1, "step"):
        shift = math.exp(-1.0) * normal_like(phi["weight"])
    theta = (phi["weight"] + shift).requires_grad_()
    (right,) = torch.autograd.grad(((x @ theta.T - y) ** 2).mean() / (2 * NOISE**2), theta)
    torch.testing.assert_close(seen.grads["weight"], right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen.grads["weight.log_std"], right * shift, rtol=1e-12, atol=1e-12)


def test_without_a_divergence_and_with_a_small_deviation_it_is_maml():
    given = problem("mlp_tanh")
    task = given.task()
    found, right = (
        om.Inner(om.model_loss(given.module, given.loss), rule, 4)
        for rule in (om.rules.bayes_by_gradient(lr=0.1, log_std=-20.0, kl_weight=0.0), om.rules.sgd(lr=0.1))
    )
    assert relative_error(*(one.adapt(one.init(given.weights()), task.support) for one in (found, right))) < 1e-6
    grads = (om.exact(one)(one.init(given.weights()), task).grads.weights for one in (found, right))
    assert relative_error(*grads) < 1e-6


def test_an_empty_support_set_gives_draws_of_the_prior():
    given = problem("mlp_tanh")
    rule = om.rules.bayes_by_gradient(log_std=-2.0)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 3, posterior=om.posteriors.samples(), samples=200)
    meta, support = inner.init(given.weights()), given.task(0, 0, 1).support
    (belief,) = inner.believe(meta, support)
    noise = torch.cat([(value - meta.weights[n]).flatten(1) for n, value in belief.params.items()], 1) / math.exp(-2)
    assert float(noise.std()) == pytest.approx(1.0, abs=4 / (2 * noise.numel()) ** 0.5)


def test_a_tight_prior_holds_the_weights_and_does_not_diverge():
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.bayes_by_gradient(lr=0.1, log_std=-9.0), 50)
    meta, support = inner.init(given.weights()), given.task().support
    phi = run_inner_loop(inner, meta, support).phi
    assert relative_error({name: phi[name] for name in meta.weights}, meta.weights) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_std": 21.0}, "log_std is 21.0: the logarithm of a standard deviation is in -20 to 20"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0: it is 0 or more"),
        ({"draws": 0}, "draws is 0: it is 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        om.rules.bayes_by_gradient(**options)
