"""The proximal inner problem, and the implicit gradient of its minimiser."""

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.metagrads.implicit import implicit
from online_meta.testing.compare import assert_close, relative_error
from online_meta.types import Carry
from tests.numerics.problems import MODELS, problem, regression_task
from tests.numerics.reference_loop import STEPS, check_against_reference

STRENGTH = 0.5


@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
def test_proximal_is_descent_on_the_loss_plus_a_pull_to_the_start(name, fast):
    def reference(weights, adapts, rule, gradient):
        phi = {name: weights[name] for name in adapts}
        for _ in range(STEPS):
            grads = gradient(phi)
            phi = {n: phi[n] - 0.1 * grads[n] - 0.1 * STRENGTH * (phi[n] - weights[n]) for n in phi}
        return phi

    check_against_reference(om.rules.proximal(lr=0.1, strength=STRENGTH), reference, name, fast)


def ridge(weights, task, features):
    """Return the minimiser of mse + STRENGTH / 2 ||phi - w||^2 over a linear head, and its query loss, in closed form.

    With A the features and a column of ones: (H + s) phi = 2 / (n o) A^T y + s w, H = 2 / (n o) A^T A.
    """

    def extended(x):
        return torch.cat([features(x), x.new_ones(len(x), 1)], 1)

    design, y = extended(task.support.x), task.support.y
    start = torch.cat([weights["head.weight"], weights["head.bias"][:, None]], 1).T
    hessian = 2 / y.numel() * design.T @ design
    pull = STRENGTH * torch.eye(len(hessian), dtype=torch.float64)
    found = torch.linalg.solve(hessian + pull, 2 / y.numel() * design.T @ y + STRENGTH * start)
    return found.T, (extended(task.query.x) @ found - task.query.y).square().mean()


def setting(steps=2000, **options):
    """Return a linear head on tanh features: the loss of the weights that adapt is quadratic."""
    torch.manual_seed(3)
    module = nn.Sequential()
    module.add_module("body", nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    module.add_module("head", nn.Linear(5, 2))
    module.double()
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.proximal(lr=0.2, strength=STRENGTH), steps, ("head.*",))
    return inner, inner.init(weights), implicit(inner, **options)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_quadratic_the_implicit_gradient_is_that_of_the_closed_form(seed):
    inner, meta, gradient = setting(iterations=30, tolerance=0.0)
    leaves = {name: weight.clone().requires_grad_() for name, weight in meta.weights.items()}
    task = regression_task(seed)

    def features(x):
        return torch.tanh(x @ leaves["body.0.weight"].T + leaves["body.0.bias"])

    phi, loss = ridge(leaves, task, features)
    right = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))
    adapted = inner.adapt(meta, task.support)
    torch.testing.assert_close(torch.cat([adapted["head.weight"], adapted["head.bias"][:, None]], 1), phi.detach())
    found = gradient(meta, task)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=0)
    assert_close(found.grads.weights, right, 1e-9)
    first = om.first_order(inner)(meta, task).grads.weights
    assert relative_error(first, right) > 0.05


SMOOTH = [("mlp_tanh", ("*",)), ("mlp_tanh", ("head.*",)), ("layer_norm", ("*",)), ("conv_group_norm", ("head.*",))]
"""Problems whose adapting weights meet no kink: at a kink the inner loop could oscillate."""


@pytest.mark.parametrize(("name", "fast"), SMOOTH)
def test_more_steps_bring_the_implicit_and_the_unrolled_gradient_together(name, fast):
    given = problem(name)
    errors = []
    for steps in (2, 10, 100):
        rule = om.rules.proximal(lr=0.05, strength=10.0)
        inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
        meta, task = inner.init(given.weights()), given.task()
        found = implicit(inner, iterations=60, tolerance=1e-12)(meta, task)
        exact = om.exact(inner)(meta, task)
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-12, atol=0)
        errors.append(relative_error(found.grads.weights, exact.grads.weights))
    assert errors[0] > 3 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-8
    assert relative_error(om.first_order(inner)(meta, task).grads.weights, exact.grads.weights) > 5e-3


def test_damping_is_added_to_the_diagonal():
    """The reference on the linear head is s (H + s + d / lr)^-1 grad f(phi)."""
    damping, rate = 0.3, 0.2
    inner, meta, gradient = setting(iterations=30, tolerance=0.0, damping=damping)
    task = regression_task(1)

    def design(x):
        features = torch.tanh(x @ meta.weights["body.0.weight"].T + meta.weights["body.0.bias"])
        return torch.cat([features, x.new_ones(len(x), 1)], 1)

    adapted = inner.adapt(meta, task.support)
    phi = torch.cat([adapted["head.weight"], adapted["head.bias"][:, None]], 1).T
    support, query = design(task.support.x), design(task.query.x)
    slope = 2 / task.query.y.numel() * query.T @ (query @ phi - task.query.y)
    hessian = 2 / task.support.y.numel() * support.T @ support
    right = STRENGTH * torch.linalg.solve(hessian + (STRENGTH + damping / rate) * torch.eye(len(hessian)), slope).T
    found = gradient(meta, task).grads.weights
    assert_close({"head": torch.cat([found["head.weight"], found["head.bias"][:, None]], 1)}, {"head": right}, 1e-9)


def test_unneeded_iterations_change_no_bit():
    found = [setting(50, iterations=n, tolerance=1e-6)[2] for n in (2, 20, 60)]
    _, meta, _ = setting()
    few, enough, many = (gradient(meta, regression_task()) for gradient in found)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(enough), tree_leaves(many), strict=True))
    assert relative_error(few.grads.weights, enough.grads.weights) > 1e-6


def test_a_tolerance_ends_the_iterations():
    _, meta, loose = setting(50, iterations=30, tolerance=0.3)
    _, _, tight = setting(50, iterations=30, tolerance=1e-12)
    _, _, one = setting(50, iterations=1, tolerance=0.0)
    found, right, first = (gradient(meta, regression_task()).grads.weights for gradient in (loose, tight, one))
    assert relative_error(found, right) > 1e-6
    assert relative_error(found, right) < 0.5
    assert relative_error(first, right) > 1e-3


def test_tasks_that_need_different_iterations_can_be_vectorised():
    _, meta, gradient = setting(60, iterations=12, tolerance=1e-3)
    tasks = []
    for seed, scale in enumerate(
        (1.0, 0.01, 0.3)
    ):  # with inputs of 0.01 the Hessian is nearly a multiple of the identity
        (x, y), query = regression_task(seed)
        tasks.append(om.Task(om.Batch(scale * x, y), query))
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    together = vmap(lambda task: gradient(meta, task))(stacked)
    one_by_one = tree_map(lambda *leaves: torch.stack(leaves), *[gradient(meta, task) for task in tasks])
    for found, right in zip(tree_leaves(together), tree_leaves(one_by_one), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-10)


def test_the_gradient_is_finite_where_the_regularised_loss_is_not_convex():
    inner = om.Inner(lambda params, batch: -params["w"].square().sum(), om.rules.proximal(lr=0.1, strength=1.0), 1)
    meta, task = om.Meta({"w": torch.tensor([1.0, -2.0])}, {}), regression_task()
    found = implicit(inner)(meta, task)
    ends = inner.adapt(meta, task.support)["w"]
    torch.testing.assert_close(found.grads.weights["w"], 0.1 * -2 * ends)  # lr * strength * grad f, the first term


def decay(lr=0.1):
    """Return descent with weight decay: it pulls to zero, not to the start."""
    return om.types.InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi, support: Carry(phi, {}),
        update=lambda rule, carry, seen, step: Carry(
            {n: w - lr * (seen.grads[n] + 0.5 * w) for n, w in carry.phi.items()}, {}
        ),
        view=lambda rule, weights: weights,
    )


def pulled_by_a_moving_average(lr=0.1):
    """Return a rule that pulls to a moving average of the weights, which moves away from the start."""
    plain = om.rules.proximal(lr=lr)

    def update(rule, carry, seen, step):
        after = plain.update(rule, carry, seen, step).phi
        return Carry(after, {n: 0.9 * s + 0.1 * after[n] for n, s in carry.state.items()})

    return plain._replace(update=update)


HAVE_NO_PULL = [
    *(
        getattr(om.rules, n)
        for n in ("sgd", "momentum", "adam", "meta_sgd", "t_net", "mt_net", "meta_curvature", "cavia")
    ),
    decay,
    pulled_by_a_moving_average,
]


@pytest.mark.parametrize("make", HAVE_NO_PULL, ids=lambda make: make.__name__)
def test_a_rule_that_does_not_pull_back_is_refused(make):
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"does not pull back to its start.*use one that does, rules\.proximal"):
        implicit(om.Inner(lambda params, batch: params["w"].sum(), make(), 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_options_are_refused():
    inner = om.Inner(lambda params, batch: params["w"].sum(), om.rules.proximal(), 5)
    with pytest.raises(ValueError, match="iterations is 0"):
        implicit(inner, iterations=0)
    for tolerance in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="tolerance is"):
            implicit(inner, tolerance=tolerance)
        with pytest.raises(ValueError, match="damping is"):
            implicit(inner, damping=tolerance)
    with pytest.raises(ValueError, match=r"inner\.steps is 0"):
        implicit(om.Inner(inner.loss, inner.rule, 0))
    for strength in (0.0, -1.0, float("nan"), 20.0):
        with pytest.raises(ValueError, match=r"strength is .*below 2 / lr = 20"):
            om.rules.proximal(lr=0.1, strength=strength)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_implicit_gradient_is_finite_for_every_model(name):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.proximal(lr=0.05, strength=2.0), 5)
    found = implicit(inner, iterations=3)(inner.init(given.weights()), given.task())
    assert all(torch.isfinite(leaf).all() for leaf in tree_leaves(found))
