"""Warped gradient descent agrees with plain autograd and with its objective."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.functional.randomness import INIT_STEP, seeded
from online_meta.inner import init_carry, query_loss, slow_weights, step
from online_meta.metagrads.warp_grad import warp_grad
from online_meta.testing.compare import assert_close, flat, relative_error
from online_meta.testing.learned_rules import whole_seam
from online_meta.testing.oracle import CRITERIA, central_difference
from online_meta.types import Carry, Seen
from tests.numerics.problems import problem
from tests.numerics.reference_loop import join_parts, shifted

STEPS = 4
RULES = {
    "sgd": om.rules.sgd(lr=0.1),
    "momentum": om.rules.momentum(lr=0.05),
    "meta_sgd": om.rules.meta_sgd(lr=0.1),
    "t_net": om.rules.t_net(lr=0.1),
    "mt_net": om.rules.mt_net(lr=0.1),
    "meta_curvature": om.rules.meta_curvature(lr=0.1),
    "whole_seam": whole_seam(lr=0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
FAST = [("*",), ("head.*",), ("body.0.*", "head.*")]
every_fast = pytest.mark.parametrize("fast", FAST, ids=["all", "head", "around_a_warp_layer"])


def setting(name, rule, fast=("*",), steps=STEPS):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule))


def detached(values):
    return {name: value.detach() for name, value in values.items()}


def reference(given, inner, meta, task):
    """Return the last query loss, the warp's gradient and the end of the trajectory, computed with plain autograd."""
    rule, adapts = inner.rule, [n for n in meta.weights if any(fnmatchcase(n, glob) for glob in inner.fast)]

    def loss_of(weights, batch):
        return CRITERIA[given.loss](functional_call(given.module, weights, (batch.x,)), batch.y)

    with seeded(task.support, INIT_STEP):
        carry = rule.start(meta.rule, {name: meta.weights[name] for name in adapts}, task.support)
    total = {}
    for k in range(inner.steps):
        slow = {n: w.clone().requires_grad_() for n, w in meta.weights.items() if n not in adapts}
        learned = {n: v.clone().requires_grad_() for n, v in meta.rule.items()}
        phi = {n: v.detach().requires_grad_() for n, v in carry.phi.items()}
        support_loss = loss_of(rule.view(learned, {**slow, **phi}), task.support)
        grads = torch.autograd.grad(support_loss, [*phi.values()], create_graph=True)
        constant = Carry(detached(phi), detached(carry.state))
        carry = rule.update(learned, constant, Seen(support_loss, dict(zip(phi, grads, strict=True))), k)
        loss = loss_of(rule.view(learned, {**slow, **carry.phi}), task.query)
        omega = join_parts(om.Meta(slow, learned))
        shares = torch.autograd.grad(loss, [*omega.values()], materialize_grads=True) if omega else ()
        for key, share in zip(omega, shares, strict=True):
            total[key] = total.get(key, 0.0) + share / inner.steps
        carry = Carry(detached(carry.phi), detached(carry.state))
    return loss.detach(), total, carry.phi


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
@every_fast
@every_rule
def test_the_warp_learns_from_each_step_and_the_start_by_reptile(rule, fast, name):
    given, inner, meta = setting(name, rule, fast)
    for seed in range(2):
        task = given.task(seed)
        found = warp_grad(inner)(meta, task)
        loss, warp, ends = reference(given, inner, meta, task)
        torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=0)
        right = warp | {f"weights/{n}": meta.weights[n] - value for n, value in ends.items()}
        assert_close(join_parts(found.grads), right, 1e-10)


@pytest.mark.parametrize("rule", [RULES["t_net"], RULES["meta_sgd"]], ids=["t_net", "meta_sgd"])
def test_the_warps_gradient_is_the_slope_of_its_objective(rule):
    given, inner, meta = setting("mlp_tanh", rule, ("body.0.*", "head.*"))
    task = given.task()
    held = om.Meta(slow_weights(inner, meta.weights), meta.rule)
    carries = [init_carry(inner, meta, task.support)]
    for k in range(STEPS):
        carries.append(step(inner, held, carries[-1], task.support, k))

    def objective(values):
        here = om.Meta({n: values[f"weights/{n}"] for n in held.weights}, {n: values[f"rule/{n}"] for n in held.rule})
        ends = [step(inner, here, carry, task.support, k).phi for k, carry in enumerate(carries[:-1])]
        return torch.stack([query_loss(inner, here, phi, task.query) for phi in ends]).mean()

    at = join_parts(held)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in at.items()}
    found = join_parts(warp_grad(inner)(meta, task).grads)
    slope = central_difference(objective, at, along)
    assert float(flat({n: found[n] for n in at}) @ flat(along)) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@every_rule
def test_the_start_can_use_the_first_order_gradient(rule):
    given, inner, meta = setting("mlp_tanh", rule, ("body.0.*", "head.*"))
    task = given.task()
    found, reptile = (warp_grad(inner, initialisation=by)(meta, task) for by in ("first_order", "reptile"))
    first = om.first_order(inner)(meta, task)
    assert torch.equal(found.loss, reptile.loss)
    for name, grad in found.grads.weights.items():
        warps = name.startswith("body.2.")
        assert torch.equal(grad, (reptile if warps else first).grads.weights[name])
        assert not torch.equal(grad, (first if warps else reptile).grads.weights[name])
    assert all(torch.equal(grad, reptile.grads.rule[name]) for name, grad in found.grads.rule.items())


@pytest.mark.parametrize("rule", [RULES["t_net"], RULES["meta_sgd"]], ids=["t_net", "meta_sgd"])
def test_the_warp_gradient_equals_the_exact_one_only_for_one_step(rule):
    for steps, same in ((1, True), (STEPS, False)):
        given, inner, meta = setting("mlp_tanh", rule, ("head.*",), steps)
        found, exact = (join_parts(make(inner)(meta, given.task()).grads) for make in (warp_grad, om.exact))
        warp = [key for key in found if not key.startswith("weights/head.")]
        error = relative_error({key: found[key] for key in warp}, {key: exact[key] for key in warp})
        assert error < 1e-12 if same else error > 1e-3


def test_tasks_can_be_vectorised():
    given, inner, meta = setting("mlp_tanh", RULES["t_net"], ("head.*",))
    tasks = [given.task(seed) for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    for by in ("reptile", "first_order"):
        gradient = warp_grad(inner, initialisation=by)
        together = vmap(lambda task, gradient=gradient: gradient(meta, task))(stacked)
        one_by_one = tree_map(lambda *leaves: torch.stack(leaves), *[gradient(meta, task) for task in tasks])
        for found, right in zip(tree_leaves(together), tree_leaves(one_by_one), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_wrong_options_are_refused():
    _, inner, _ = setting("mlp_tanh", RULES["sgd"])
    with pytest.raises(ValueError, match="initialisation is 'maml': it is one of reptile, first_order"):
        warp_grad(inner, initialisation="maml")
    with pytest.raises(ValueError, match=r"inner\.steps is 0; warp_grad needs at least 1 step"):
        warp_grad(setting("mlp_tanh", RULES["sgd"], steps=0)[1])
