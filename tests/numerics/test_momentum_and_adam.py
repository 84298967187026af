"""Inner rules with state: momentum and Adam."""

import copy

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import CRITERIA
from online_meta.types import Batch, Seen
from tests.numerics.problems import Net, problem
from tests.numerics.reference_loop import STEPS, check_against_reference

every_problem = pytest.mark.parametrize("name", ["mlp_tanh", "conv_group_norm"])
every_fast = pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])

RULES = {
    "momentum": (om.rules.momentum(lr=0.05, momentum=0.8), torch.optim.SGD, {"lr": 0.05, "momentum": 0.8}),
    "nesterov": (
        om.rules.momentum(lr=0.05, momentum=0.8, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    ),
    "adam": (om.rules.adam(lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    "adam_of_other_betas": (
        om.rules.adam(lr=0.02, betas=[0.5, 0.7], eps=1e-3),
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.5, 0.7), "eps": 1e-3},
    ),
}
every_rule = pytest.mark.parametrize(("rule", "make", "options"), RULES.values(), ids=RULES)


def inner_of(given, rule, steps=STEPS):
    return om.Inner(om.model_loss(given.module, given.loss), rule, steps)


def train_with_torch(given, batch, make, options, steps):
    """Yield the weights of a copy of the module after each step of torch's optimizer."""
    module = copy.deepcopy(given.module)
    optimizer = make(module.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        CRITERIA[given.loss](module(batch.x), batch.y).backward()
        optimizer.step()
        yield {name: weight.detach().clone() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_relu", "conv_group_norm"])
@every_rule
def test_every_step_equals_that_of_the_torch_optimizer(rule, make, options, name):
    given = problem(name)
    for seed in range(2):
        support = given.task(seed).support
        for k, right in enumerate(train_with_torch(given, support, make, options, 12), start=1):
            inner = inner_of(given, rule, k)
            assert_close(inner.adapt(inner.init(given.weights()), support), right, 1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@every_fast
@every_problem
def test_momentum_is_differentiated_through_its_state(name, fast, nesterov):
    def reference(weights, adapts, rule, gradient):
        phi = {name: weights[name] for name in adapts}
        velocity = dict.fromkeys(adapts, 0.0)
        for _ in range(STEPS):
            grads = gradient(phi)
            for name in adapts:
                velocity[name] = 0.8 * velocity[name] + grads[name]
                phi = {
                    **phi,
                    name: phi[name] - 0.1 * ((grads[name] + 0.8 * velocity[name]) if nesterov else velocity[name]),
                }
        return phi

    check_against_reference(om.rules.momentum(lr=0.1, momentum=0.8, nesterov=nesterov), reference, name, fast)


@every_fast
@every_problem
def test_adam_is_differentiated_through_its_state(name, fast):
    def reference(weights, adapts, rule, gradient):
        phi = {name: weights[name] for name in adapts}
        mean, square = dict.fromkeys(adapts, 0.0), dict.fromkeys(adapts, 0.0)
        for t in range(1, STEPS + 1):
            grads = gradient(phi)
            for name in adapts:
                mean[name] = 0.6 * mean[name] + 0.4 * grads[name]
                square[name] = 0.9 * square[name] + 0.1 * grads[name] ** 2
                unbiased = mean[name] / (1 - 0.6**t), square[name] / (1 - 0.9**t)
                phi = {**phi, name: phi[name] - 0.02 * unbiased[0] / (unbiased[1] ** 0.5 + 1e-4)}
        return phi

    check_against_reference(om.rules.adam(lr=0.02, betas=(0.6, 0.9), eps=1e-4), reference, name, fast)


@pytest.mark.parametrize("estimator", [om.exact, om.first_order])
def test_a_weight_without_gradient_stays_and_harms_no_other(estimator):
    given = problem("mlp_relu")
    weights = given.weights()
    weights["body.0.bias"][2] = -100.0  # the unit is dead: its second moment stays 0
    inner = inner_of(given, om.rules.adam(lr=0.01))
    meta, task = inner.init(weights), given.task()
    adapted, found = inner.adapt(meta, task.support), estimator(inner)(meta, task)
    assert torch.equal(adapted["body.0.weight"][2], weights["body.0.weight"][2])
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(grad).all() for grad in found.grads.weights.values())
    assert not found.grads.weights["body.0.weight"][2].any()

    alive = [0, 1, 3, 4, 5, 6]  # the others get the gradients of a network without the dead unit
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    narrow = Net(body, nn.Linear(6, 2)).double()
    rows = {"body.0.weight": (alive,), "body.0.bias": (alive,), "body.2.weight": (slice(None), alive)}
    cut = {name: weight[rows[name]] if name in rows else weight for name, weight in weights.items()}
    small = om.Inner(om.model_loss(narrow, given.loss), inner.rule, STEPS)
    right = estimator(small)(small.init(cut), task).grads.weights
    assert_close({n: g[rows[n]] if n in rows else g for n, g in found.grads.weights.items()}, right, 1e-10)


@pytest.mark.parametrize("name", ["mlp_relu", "conv_group_norm"])
@every_rule
def test_reptile_moves_to_where_the_torch_optimizer_ends(rule, make, options, name):
    given = problem(name)
    task = given.task()
    everything = om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
    inner = inner_of(given, rule, 8)
    found = om.reptile(inner)(inner.init(given.weights()), task).grads.weights
    *_, after = train_with_torch(given, everything, make, options, 8)
    assert_close(found, {n: w - after[n] for n, w in given.weights().items()}, 1e-10)


@every_rule
def test_batched_reptile_is_the_mean_displacement_over_distinct_tasks(rule, make, options):
    given = problem("mlp_tanh")
    tasks = [given.task(0, 5, 4), given.task(1, 7, 2), given.task(2, 3, 6)]
    inner = inner_of(given, rule, 6)
    found = om.over_tasks(om.reptile(inner), "loop")(inner.init(given.weights()), tasks).grads.weights
    displacements = []
    for task in tasks:
        everything = om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
        *_, after = train_with_torch(given, everything, make, options, 6)
        displacements.append({n: w - after[n] for n, w in given.weights().items()})
    assert_close(found, {n: sum(displacement[n] for displacement in displacements) / 3 for n in found}, 1e-10)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"momentum is 1\.0: it lies in \[0, 1\)"):
        om.rules.momentum(momentum=1.0)
    for betas in ((0.9,), (0.9, 1.0), (-0.1, 0.5)):
        with pytest.raises(ValueError, match=r"they are two numbers in \[0, 1\)"):
            om.rules.adam(betas=betas)
    with pytest.raises(ValueError, match=r"eps is 0\.0: it is positive"):
        om.rules.adam(eps=0.0)


@pytest.mark.parametrize("shapes", [((40, 1), (40,), (7, 40), (1,)), ((), (3,), (5, 2, 3))])
def test_small_weights_are_one_vector_with_the_same_bits(shapes: tuple[tuple[int, ...], ...]) -> None:
    rule, random = om.rules.adam(lr=0.01), torch.Generator().manual_seed(1)
    phi = {f"w{place}": torch.randn(shape, generator=random) for place, shape in enumerate(shapes)}
    nothing = torch.zeros(())
    joined = apart = rule.start({}, phi, Batch(nothing, nothing))
    for step in range(30):
        grads = {
            name: torch.randn(value.shape, generator=random) * (torch.rand(value.shape, generator=random) > 0.3)
            for name, value in phi.items()
        }
        with torch.no_grad():
            joined = rule.update({}, joined, Seen(nothing, grads), step)
        with torch.enable_grad():
            apart = rule.update({}, apart, Seen(nothing, grads), step)
        for one, other in zip(joined, apart, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())
            assert all(value.shape == other[name].shape for name, value in one.items())
