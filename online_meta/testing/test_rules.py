"""What every inner rule keeps: those of ``online_meta.rules`` and those that use all of the seam."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import online_meta as om
from online_meta import registry
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import drawing, fast_weights, init_carry, see_support
from online_meta.testing import learned_rules
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.problems import EVERY as EVERY_MODEL
from online_meta.testing.problems import problem
from online_meta.testing.unrolled import Loop
from online_meta.types import Seen

RULES = {name: registry.load(om.rules, name) for name in registry.names(om.rules)}
EVERY = {
    **RULES,
    "seam_whole": learned_rules.whole_seam,
    "seam_support": learned_rules.reads_the_support,
    "seam_loss": learned_rules.reads_the_loss,
    "seam_loss_alone": learned_rules.sees_the_loss_alone,
    "seam_keyed": learned_rules.draws_by_key,
    "svgd_of_three": partial(om.rules.svgd, particles=3),
}
RANDOM = {name for name, make in EVERY.items() if make().random is True}
"""Seeded by the bytes of a task, which ``vmap`` does not show: such rules are run in a loop."""
FAST = [("*",), ("head.*",)]
PROBLEMS = ["mlp_tanh", "conv_batch_norm"]
FORGETFUL = {RULES["cavia"]}
"""Start from zeros whatever the weights are: if all of them adapt, there is no meta-gradient; and if there are as many
samples of each class, as in ``conv_batch_norm``, not even a gradient is left at a network of zeros."""
DRAWS_FIRST = {RULES["platipus"]}
"""Draw the weights in their first step, so that it need not descend."""
SEVERAL = {EVERY["svgd_of_three"]}
"""Adapt several models, which keep apart: none of them need descend."""
BLIND = {make for make in EVERY.values() if make().sees == "loss"}
"""See no gradient: they need not descend, and their first-order gradient is the exact one."""

every_rule = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
vectorised = pytest.mark.parametrize(
    "make",
    [make for name, make in EVERY.items() if name not in RANDOM],
    ids=[name for name in EVERY if name not in RANDOM],
)
own_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
every_fast = pytest.mark.parametrize("fast", FAST, ids=["all", "head"])


def setting(name, rule, steps=3, fast=("*",), seed=1, make_problem=problem):
    """Return the problem, the inner loop, its meta-parameters (the rule's own moved off their start) and a task.

    For a rule that answers classes alone, a row's class says whether its first target is among the larger half.
    """
    given = make_problem(name)
    if rule.head is not None and given.loss == "mse" and "numbers" not in rule.head.kinds:
        given = given._replace(loss="cross_entropy", task=partial(with_classes, given.task))
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
    meta = inner.init(given.weights())
    random = torch.Generator().manual_seed(seed)

    def drawn(value):
        return torch.rand(value.shape, generator=random, dtype=value.dtype)

    moved = {n: v * (1 + 0.2 * drawn(v)) + 0.02 * drawn(v) for n, v in meta.rule.items()}
    return given, inner, om.Meta(meta.weights, moved), given.task()


def with_classes(make_task, *args, **kwargs):
    """Return a task with class 1 for the rows whose first target is among the larger half, and 0 for the others."""
    task = make_task(*args, **kwargs)
    ranks = [batch.y[:, 0].argsort().argsort() for batch in task]
    return om.Task(*(batch._replace(y=2 * rank // len(rank)) for batch, rank in zip(task, ranks, strict=True)))


def is_like(found, right):
    """Assert the same names in the same order, shapes, dtypes."""
    assert list(found) == list(right)
    for name, value in right.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name


def what_is_seen(rule, phi):
    """Return what a step of the rule could see: a loss, and a gradient in the shapes of phi."""
    loss = torch.ones((), dtype=next(iter(phi.values())).dtype)
    return Seen(loss, {} if rule.sees == "loss" else dict(phi))


@own_rule
def test_a_rule_is_made_of_a_learning_rate_alone(make):
    assert isinstance(make(), om.types.InnerRule)
    assert isinstance(make(lr=0.5), om.types.InnerRule)
    for wrong in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="lr"):
            make(lr=wrong)


@every_fast
@every_rule
def test_init_start_and_view_keep_names_shapes_and_dtypes(make, fast):
    rule = make()
    for dtype in (torch.float32, torch.float64):
        weights = {name: weight.to(dtype) for name, weight in problem("mlp_tanh").weights().items()}
        inner = om.Inner(om.model_loss(problem("mlp_tanh").module, "mse"), rule, 1, fast)
        phi = fast_weights(inner, weights)
        learned = rule.init(phi)
        assert {value.dtype for value in learned.values()} <= {dtype}
        assert all(torch.isfinite(value).all() for value in learned.values())
        is_like(rule.view(learned, weights), weights)
        support = problem("mlp_tanh").task().support
        support = support._replace(x=support.x.to(dtype), y=support.y.to(dtype))
        with drawing(inner, support, INIT_STEP, "begin"):
            before = rule.start(learned, phi, support)
            after = rule.update(learned, before, what_is_seen(rule, before.phi), 0)
        is_like({name: before.phi[name] for name in phi}, phi)
        is_like(after.phi, before.phi)
        is_like(after.state, before.state)


@every_rule
def test_the_four_functions_are_pure(make):
    _, inner, meta, task = setting("mlp_tanh", make())
    carry = init_carry(inner, meta, task.support)
    seen = see_support(inner, meta, carry.phi, task.support, 0)
    draws = partial(drawing, inner, task.support, INIT_STEP, "begin")
    calls = {
        "init": lambda: inner.rule.init(meta.weights),
        "start": lambda: inner.rule.start(meta.rule, meta.weights, task.support),
        "update": lambda: inner.rule.update(meta.rule, carry, seen, 1),
        "view": lambda: inner.rule.view(meta.rule, meta.weights),
    }
    given = [value for value in tree_leaves((meta, carry, seen)) if isinstance(value, torch.Tensor)]
    before = [(value._version, value.clone()) for value in given]
    for name, call in calls.items():
        with draws():
            first = tree_flatten(call())
        with draws():
            second = tree_flatten(call())
        assert first[1] == second[1], name
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)), name
        for value, (version, copy) in zip(given, before, strict=True):
            assert value._version == version, f"{name} writes to its arguments"
            assert torch.equal(value, copy), f"{name} writes to its arguments"


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", PROBLEMS)
@every_fast
@every_rule
def test_exact_gradients_of_weights_and_rule(make, fast, name, steps):
    given, inner, meta, task = setting(name, make(), steps, fast)
    found = om.exact(inner)(meta, task)
    right = Loop(given.module, given.loss, inner.rule, steps, fast).gradient(meta, task)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    if meta.rule:
        assert_close(found.grads.rule, right.grads.rule, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
@every_fast
@every_rule
def test_first_order_gradients_of_weights_and_rule(make, fast, name):
    given, inner, meta, task = setting(name, make(), 4, fast)
    found = om.first_order(inner)(meta, task)
    right = Loop(given.module, given.loss, inner.rule, 4, fast).gradient(meta, task, constant_gradients=True)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    if meta.rule:
        assert_close(found.grads.rule, right.grads.rule, 1e-10)


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
@pytest.mark.parametrize("name", [name for name in EVERY_MODEL if name not in PROBLEMS])
@every_rule
def test_gradients_on_every_kind_of_model(make, name, estimator):
    """Each normalisation, attention, a recurrence, dropout: what is exact on one network is so on all."""
    check_gradients(name, make, estimator)


def check_gradients(name, make, estimator, make_problem=problem):
    """Compare an estimator's gradient on a problem with that of the unrolled loop."""
    given, inner, meta, task = setting(name, make(), 2, make_problem=make_problem)
    found = getattr(om, estimator)(inner)(meta, task)
    right = Loop(given.module, given.loss, inner.rule, 2, ("*",)).gradient(
        meta, task, constant_gradients=estimator == "first_order"
    )
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    if meta.rule:
        assert_close(found.grads.rule, right.grads.rule, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
@vectorised
def test_tasks_can_be_vectorised(make, name):
    given, inner, meta, _ = setting(name, make())
    tasks = [given.task(seed) for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    for work in (lambda task: inner.adapt(meta, task.support), lambda task: om.exact(inner)(meta, task)):
        together = vmap(work)(stacked)
        one_by_one = tree_map(lambda *leaves: torch.stack(leaves), *[work(task) for task in tasks])
        for found, right in zip(tree_leaves(together), tree_leaves(one_by_one), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
@every_fast
@every_rule
def test_small_steps_reduce_the_support_loss(make, fast, name):
    if make in BLIND | DRAWS_FIRST | SEVERAL:
        return
    given, inner, _, task = setting(name, make(lr=1e-3), 1, fast)
    meta = inner.init(given.weights())
    still = make in FORGETFUL and fast == ("*",) and name == "conv_batch_norm"
    losses = [
        float(inner.loss(replace(inner, steps=steps).adapt(meta, task.support), task.support)) for steps in (0, 1, 10)
    ]
    assert losses[0] == losses[1] == losses[2] if still else losses[0] > losses[1] > losses[2]


@every_rule
def test_what_a_rule_learns_does_something(make):
    """The gradients of the rule's parameters are no zeros, so comparing them says something."""
    _, inner, meta, task = setting("mlp_tanh", make())
    estimator = om.variational if inner.rule.infer else om.exact  # What draws in training alone has no other gradient.
    grads = estimator(inner)(meta, task).grads.rule
    assert list(grads) == list(meta.rule)
    assert all(grad.abs().max() > 0 for grad in grads.values())


@every_fast
@every_rule
def test_the_first_order_gradient_is_not_the_exact_one(make, fast):
    _, inner, meta, task = setting("mlp_tanh", make(lr=0.05), 4, fast)
    found, exact = (gradient(inner)(meta, task).grads for gradient in (om.first_order, om.exact))
    if make in BLIND:
        assert relative_error(found.weights, exact.weights) < 1e-12
    elif make in FORGETFUL and fast == ("*",):
        assert not any(grad.any() for grad in [*found.weights.values(), *exact.weights.values()])
    else:
        assert relative_error(found.weights, exact.weights) > 1e-3


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_random_rule_says_that_it_cannot_be_vectorised(name):
    given, inner, meta, _ = setting("mlp_tanh", EVERY[name]())
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *[given.task(seed) for seed in range(2)])
    with pytest.raises(RuntimeError):
        vmap(lambda task: inner.adapt(meta, task.support))(stacked)


def moved_weights(carry, meta):
    """Return the weights that ``start`` changes."""
    return {name: value for name, value in carry.phi.items() if not torch.equal(value, meta.weights[name])}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_random_rule_draws_for_each_task_and_always_the_same(name):
    given, inner, meta, _ = setting("mlp_tanh", EVERY[name]())
    before = torch.random.get_rng_state()
    carries = [init_carry(inner, meta, given.task(seed).support) for seed in (0, 0, 1)]
    states = [{**carry.state, **moved_weights(carry, meta)} for carry in carries]
    assert states[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("name", sorted(name for name, make in EVERY.items() if make().random == "keyed"))
def test_a_rule_that_draws_by_key_adapts_otherwise_with_another_seed(name):
    _, inner, meta, task = setting("mlp_tanh", EVERY[name]())
    before = torch.random.get_rng_state()
    first, again, other = (replace(inner, seed=seed).adapt(meta, task.support) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def count_backward_passes(monkeypatch, work):
    """Return how often ``work`` asks torch for gradients."""
    calls = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    work()
    monkeypatch.undo()
    return len(calls)


@every_rule
def test_a_rule_that_sees_the_loss_alone_costs_no_backward_pass(make, monkeypatch):
    _, inner, meta, task = setting("mlp_tanh", make(), 4)
    blind = make in BLIND
    assert count_backward_passes(monkeypatch, lambda: inner.adapt(meta, task.support)) == (0 if blind else 4)
    # One pass for the query loss and one for each step; a gradient that is differentiated again is one more.
    passes = count_backward_passes(monkeypatch, lambda: om.exact(inner)(meta, task))
    assert passes <= 6 if blind else passes > 8


def test_the_first_order_gradient_passes_through_the_loss():
    """Andrychowicz et al. (2016) hold the gradients constant that an optimizer is given, not the loss."""
    given, inner, meta, task = setting("mlp_tanh", learned_rules.reads_the_loss(lr=0.1), 4)
    held = inner.rule._replace(
        update=lambda rule, carry, seen, step: inner.rule.update(
            rule, carry, Seen(seen.loss.detach(), seen.grads), step
        )
    )
    found = om.first_order(inner)(meta, task).grads.weights
    right = Loop(given.module, given.loss, inner.rule, 4, ("*",)).gradient(meta, task, constant_gradients=True)
    assert_close(found, right.grads.weights, 1e-10)
    assert relative_error(om.first_order(replace(inner, rule=held))(meta, task).grads.weights, found) > 1e-3


def test_phi_may_have_names_of_its_own_and_keeps_them():
    _, inner, meta, task = setting("mlp_tanh", learned_rules.reads_the_support())
    carry = init_carry(inner, meta, task.support)
    assert carry.phi.keys() == meta.weights.keys() | {learned_rules.CONTEXT}
    assert carry.phi[learned_rules.CONTEXT].shape == (len(task.support.x),)
    assert inner.adapt(meta, task.support).keys() == meta.weights.keys()


def broken(start=None, update=None):
    """Return gradient descent whose ``start`` or ``update`` changes the phi that it returns."""
    plain = om.rules.sgd()

    def changed(change, carry):
        return carry._replace(phi=change(carry.phi)) if change else carry

    return plain._replace(
        start=lambda *given: changed(start, plain.start(*given)),
        update=lambda *given: changed(update, plain.update(*given)),
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (broken(start=lambda phi: {"head.bias": phi["head.bias"]}), "start leaves out body.0.bias, body.0.weight, .*"),
        (broken(update=lambda phi: {}), "update at step 0 adds or leaves out body.0.bias, .*"),
        (broken(update=lambda phi: {**phi, "more": phi["head.bias"]}), "update at step 0 adds or leaves out more"),
        (
            broken(update=lambda phi: {**phi, "head.bias": phi["head.bias"][:1]}),
            r"update at step 0 changes the shape of head.bias from \[2\] to \[1\]",
        ),
    ],
    ids=["start_loses", "update_loses", "update_adds", "update_reshapes"],
)
def test_a_rule_that_does_not_keep_names_and_shapes_is_refused(rule, message):
    _, inner, meta, task = setting("mlp_tanh", rule, 1)
    with pytest.raises(ValueError, match=message):
        inner.adapt(meta, task.support)


def test_a_rule_sees_a_gradient_or_a_loss():
    with pytest.raises(ValueError, match="the rule sees 'hessian'"):
        om.Inner(lambda params, batch: params["w"].sum(), om.rules.sgd()._replace(sees="hessian"))
