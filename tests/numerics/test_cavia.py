"""CAVIA: only a context adapts, starting from zero."""

import pytest
import torch

import online_meta as om
from tests.numerics.problems import problem
from tests.numerics.reference_loop import STEPS, check_against_reference

LR, FAST = 0.5, ("context",)


def setting(estimator=om.exact):
    given = problem("mlp_context")
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.cavia(lr=LR), STEPS, FAST)
    return given, inner, inner.init(given.weights()), estimator(inner)


def test_the_context_starts_from_zero_and_descends():
    def reference(weights, adapts, rule, gradient):
        assert adapts == ["context"]
        phi = {"context": torch.zeros(weights["context"].shape, dtype=torch.float64, requires_grad=True)}
        for _ in range(STEPS):
            phi = {"context": phi["context"] - LR * gradient(phi)["context"]}
        return phi

    check_against_reference(om.rules.cavia(lr=LR), reference, "mlp_context", FAST)


@pytest.mark.parametrize("estimator", [om.exact, om.first_order])
def test_the_value_of_the_context_has_no_influence(estimator):
    given, inner, meta, gradient = setting(estimator)
    assert meta.weights["context"].all()
    other = om.Meta({**meta.weights, "context": meta.weights["context"] + 5.0}, {})
    task = given.task()
    found, same = gradient(meta, task), gradient(other, task)
    assert not found.grads.weights["context"].any()
    assert all(grad.any() for name, grad in found.grads.weights.items() if name != "context")
    assert all(torch.equal(grad, same.grads.weights[name]) for name, grad in found.grads.weights.items())
    adapted = inner.adapt(meta, task.support)
    assert adapted["context"].any()
    assert all(torch.equal(adapted[name], weight) for name, weight in meta.weights.items() if name != "context")
