"""Truncated back-propagation against loops that detach, and other judges than the query loss against finite slopes."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import online_meta as om
from online_meta.inner import init_carry, run_inner_loop, slow_weights
from online_meta.metagrads._adjoint import differentiate_steps, pull_back
from online_meta.testing.compare import assert_close, flat, relative_error
from online_meta.testing.learned_rules import reads_the_loss, reads_the_support, sees_the_loss_alone, whole_seam
from online_meta.testing.oracle import central_difference
from online_meta.testing.unrolled import Loop
from tests.numerics.problems import problem
from tests.numerics.reference_loop import join_parts, shifted

RULES = {
    "sgd": om.rules.sgd(lr=0.1),
    "momentum": om.rules.momentum(lr=0.05),
    "mt_net": om.rules.mt_net(lr=0.1),
    "proximal": om.rules.proximal(lr=0.1),
    "whole_seam": whole_seam(lr=0.1),
    "reads_the_support": reads_the_support(lr=0.1),
    "reads_the_loss": reads_the_loss(lr=0.1),
    "sees_the_loss_alone": sees_the_loss_alone(lr=0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
STEPS = 6
WEIGHTS = (0.1, 0.0, 0.3, 0.05, 0.2, 0.35)


def setting(rule, name="mlp_tanh", fast=("*",)):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, STEPS, fast)
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule))


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
@pytest.mark.parametrize(("cut", "step_weights"), [(4, None), (1, WEIGHTS), (2, WEIGHTS)])
@every_rule
def test_a_cut_is_the_gradient_of_a_loop_that_detaches(rule, cut, step_weights, estimator):
    given, inner, meta = setting(rule, fast=("head.*",) if cut == 2 else ("*",))
    task = given.task()
    found = getattr(om, estimator)(inner, cut=cut, step_weights=step_weights)(meta, task)
    loop = Loop(given.module, given.loss, inner.rule, STEPS, inner.fast)
    right = loop.gradient(meta, task, step_weights=step_weights, cut=cut, constant_gradients=estimator == "first_order")
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


def test_a_cut_drops_something_and_one_beyond_the_last_step_drops_nothing():
    given, inner, meta = setting(RULES["whole_seam"])
    task = given.task()
    exact, uncut = om.exact(inner)(meta, task), om.exact(inner, cut=STEPS)(meta, task)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(uncut), tree_leaves(exact), strict=True))
    assert relative_error(join_parts(om.exact(inner, cut=5)(meta, task).grads), join_parts(exact.grads)) > 1e-3


def test_a_rematerialised_loop_is_cut_at_the_same_steps():
    given, inner, meta = setting(RULES["whole_seam"])
    plain, stored = (
        om.exact(inner, cut=2, step_weights=WEIGHTS, rematerialise=again)(meta, given.task()) for again in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(plain), tree_leaves(stored), strict=True))


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
@pytest.mark.parametrize("cut", [0, -1])
def test_a_cut_below_one_step_is_refused(estimator, cut):
    with pytest.raises(ValueError, match=f"cut is {cut}: the gradient passes through at least 1 inner step"):
        getattr(om, estimator)(setting(RULES["sgd"])[1], cut=cut)


def distance(slow, carry):
    """Judge by phi, the state, the slow weights and the rule, none of which is a query loss."""
    parts = [*carry.phi.values(), *carry.state.values(), *slow.weights.values(), *slow.rule.values()]
    return torch.stack([(1 + k) * (part - 0.3).sin().square().sum() for k, part in enumerate(parts)]).sum()


@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
@every_rule
def test_the_gradient_of_another_judge_is_its_slope(rule, fast):
    given, inner, meta = setting(rule, fast=fast)
    task = given.task()
    found = pull_back(inner, meta, task, differentiate_steps(inner, task.support), judge=distance)

    def judged(values):
        here = om.Meta({n: values[f"weights/{n}"] for n in meta.weights}, {n: values[f"rule/{n}"] for n in meta.rule})
        carry = run_inner_loop(inner, here, task.support)
        return distance(om.Meta(slow_weights(inner, here.weights), here.rule), carry)

    at = join_parts(meta)
    torch.testing.assert_close(found.loss, judged(at), rtol=1e-12, atol=0)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in at.items()}
    slope = central_difference(judged, at, along, 1e-6)
    assert float(flat(join_parts(found.grads)) @ flat(along)) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_a_judge_is_asked_at_every_step_that_has_a_weight():
    given, inner, meta = setting(RULES["momentum"])
    task = given.task()
    found = pull_back(
        inner, meta, task, differentiate_steps(inner, task.support), judge=distance, weights=[0.5, *[0.0] * 5, 2.0]
    )
    slow = om.Meta(slow_weights(inner, meta.weights), meta.rule)
    ends = init_carry(inner, meta, task.support), run_inner_loop(inner, meta, task.support)
    right = 0.5 * distance(slow, ends[0]) + 2.0 * distance(slow, ends[1])
    torch.testing.assert_close(found.loss, right, rtol=1e-12, atol=0)
