"""Meta-Curvature multiplies gradients by a learned matrix along each dimension."""

import pytest
import torch

import online_meta as om
from online_meta.testing.compare import assert_close
from tests.numerics.problems import problem
from tests.numerics.reference_loop import STEPS, check_against_reference

LR = 0.1


@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
def test_gradients_are_multiplied_along_every_dimension(name, fast):
    def curved(rule, name, grad):
        if grad.ndim == 1:
            return torch.einsum("ab,b->a", rule[f"{name}.out"], grad)
        if grad.ndim == 2:
            return torch.einsum("ab,cd,bd->ac", rule[f"{name}.out"], rule[f"{name}.in"], grad)
        height, width = grad.shape[2:]
        kernel = rule[f"{name}.filter"].reshape(height, width, height, width)
        return torch.einsum("ab,cd,hwij,bdij->achw", rule[f"{name}.out"], rule[f"{name}.in"], kernel, grad)

    def reference(weights, adapts, rule, gradient):
        phi = {name: weights[name] for name in adapts}
        for _ in range(STEPS):
            grads = gradient(phi)
            phi = {name: phi[name] - LR * curved(rule, name, grads[name]) for name in phi}
        return phi

    check_against_reference(om.rules.meta_curvature(lr=LR), reference, name, fast)


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
def test_meta_curvature_starts_as_gradient_descent(name):
    given = problem(name)
    adapted = []
    for rule in (om.rules.sgd(lr=LR), om.rules.meta_curvature(lr=LR)):
        inner = om.Inner(om.model_loss(given.module, given.loss), rule, STEPS)
        adapted.append(inner.adapt(inner.init(given.weights()), given.task().support))
    assert_close(*adapted, 1e-12)


def test_meta_curvature_has_a_matrix_for_every_dimension():
    shapes = {"scalar": (), "bias": (3,), "linear": (3, 4), "conv1d": (3, 4, 5), "conv2d": (3, 4, 5, 2)}
    learned = om.rules.meta_curvature().init({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert {name: tuple(matrix.shape) for name, matrix in learned.items()} == {
        "scalar.out": (1, 1),
        "bias.out": (3, 3),
        "linear.out": (3, 3),
        "linear.in": (4, 4),
        "conv1d.out": (3, 3),
        "conv1d.in": (4, 4),
        "conv1d.filter": (5, 5),
        "conv2d.out": (3, 3),
        "conv2d.in": (4, 4),
        "conv2d.filter": (10, 10),
    }
    assert all(torch.equal(matrix, torch.eye(len(matrix))) for matrix in learned.values())
