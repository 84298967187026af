"""Meta-SGD, and one learned rate per layer and step."""

import pytest
import torch

import online_meta as om
from online_meta.testing.compare import assert_close
from tests.numerics.problems import problem
from tests.numerics.reference_loop import STEPS, check_against_reference

PROBLEMS = ["mlp_tanh", "conv_batch_norm"]
every_problem = pytest.mark.parametrize("name", PROBLEMS)
every_fast = pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])


def loop(rate):
    """Return a reference loop of gradient descent with the rate ``rate(rule, name, k)``."""

    def reference(weights, adapts, rule, gradient):
        phi = {name: weights[name] for name in adapts}
        for k in range(STEPS):
            grads = gradient(phi)
            phi = {name: phi[name] - rate(rule, name, k) * grads[name] for name in phi}
        return phi

    return reference


@every_fast
@every_problem
def test_meta_sgd_has_a_rate_for_every_entry(name, fast):
    check_against_reference(om.rules.meta_sgd(lr=0.1), loop(lambda rule, name, k: rule[name]), name, fast)


@every_fast
@every_problem
def test_a_rate_per_layer_is_shared_by_its_weight_and_bias(name, fast):
    def rate(rule, name, k):
        return rule[name.replace("weight", "lr").replace("bias", "lr")]

    check_against_reference(om.rules.meta_sgd(lr=0.1, per="layer"), loop(rate), name, fast)


@pytest.mark.parametrize("steps", [2, STEPS])
@every_problem
def test_a_rate_per_layer_and_step_keeps_its_last_value(name, steps):
    def rate(rule, name, k):
        return rule[name.replace("weight", "lr").replace("bias", "lr")][k if k < steps else steps - 1]

    check_against_reference(om.rules.meta_sgd(lr=0.1, per="layer_and_step", steps=steps), loop(rate), name)


def test_learned_rates_have_the_requested_shapes():
    weights = problem("mlp_tanh").weights() | {"context": torch.zeros(3, dtype=torch.float64)}
    layers = ["body.0.lr", "body.2.lr", "head.lr", "lr"]
    learned = om.rules.meta_sgd(lr=0.3, per="layer").init(weights)
    assert {name: value.shape for name, value in learned.items()} == dict.fromkeys(layers, ())
    learned = om.rules.meta_sgd(lr=0.3, per="layer_and_step", steps=7).init(weights)
    assert {name: value.shape for name, value in learned.items()} == dict.fromkeys(layers, (7,))
    learned = om.rules.meta_sgd(lr=0.3).init(weights)
    assert {n: v.shape for n, v in learned.items()} == {n: w.shape for n, w in weights.items()}
    assert all((value == 0.3).all() for value in learned.values())


def test_the_rate_of_a_step_that_is_not_made_has_no_gradient():
    given = problem("mlp_tanh")
    rule = om.rules.meta_sgd(lr=0.1, per="layer_and_step", steps=5)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 3)
    grads = om.exact(inner)(inner.init(given.weights()), given.task()).grads.rule
    assert all(grad[:3].all() and not grad[3:].any() for grad in grads.values())


@pytest.mark.parametrize("per", ["parameter", "layer", "layer_and_step"])
@every_problem
def test_equal_rates_are_gradient_descent(name, per):
    given = problem(name)
    adapted = []
    for rule in (om.rules.sgd(lr=0.1), om.rules.meta_sgd(lr=0.1, per=per, steps=2)):
        inner = om.Inner(om.model_loss(given.module, given.loss), rule, STEPS)
        adapted.append(inner.adapt(inner.init(given.weights()), given.task().support))
    assert_close(*adapted, 1e-14)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="per is 'row': it is one of parameter, layer, layer_and_step"):
        om.rules.meta_sgd(per="row")
    with pytest.raises(ValueError, match="steps is 0: rates are learned for 1 step or more"):
        om.rules.meta_sgd(per="layer_and_step", steps=0)
