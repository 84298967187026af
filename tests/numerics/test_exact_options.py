"""The multi-step loss and the rematerialisation of ``exact``."""

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import online_meta as om
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learned_rules import whole_seam
from online_meta.testing.unrolled import Loop
from tests.numerics.meter import MemoryMeter, bytes_of
from tests.numerics.problems import problem
from tests.numerics.reference_loop import join_parts, shifted

RULES = {
    "sgd": om.rules.sgd(lr=0.1),
    "momentum": om.rules.momentum(lr=0.05),
    "adam": om.rules.adam(lr=0.01),
    "meta_sgd": om.rules.meta_sgd(lr=0.1, per="layer_and_step"),
    "mt_net": om.rules.mt_net(lr=0.1),
    "whole_seam": whole_seam(lr=0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def setting(rule, steps, name="mlp_tanh", fast=("*",)):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule))


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
@every_rule
def test_a_multi_step_loss_is_the_weighted_sum_over_the_steps(rule, name, fast, rematerialise):
    given, inner, meta = setting(rule, 5, name, fast)
    step_weights = (0.1, 0.0, 0.3, 0.05, 0.55)
    for seed in range(2):
        task = given.task(seed)
        found = om.exact(inner, step_weights=step_weights, rematerialise=rematerialise)(meta, task)
        loop = Loop(given.module, given.loss, inner.rule, 5, fast)
        right = loop.gradient(meta, task, step_weights=step_weights)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
        assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)
        assert relative_error(join_parts(found.grads), join_parts(om.exact(inner)(meta, task).grads)) > 1e-3


def test_a_multi_step_loss_of_the_last_step_alone_is_the_plain_loss():
    given, inner, meta = setting(RULES["momentum"], 3)
    found = om.exact(inner, step_weights=[0, 0, 1])(meta, given.task())
    plain = om.exact(inner)(meta, given.task())
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(plain), strict=True))


@pytest.mark.parametrize(
    "wrong", [[], [1.0], [0.5, 0.5, 0.5, 0.5], [0.5, -0.1, 0.6], [0.0, 0.0, 0.0], [math.nan, 1, 1]]
)
def test_step_weights_that_do_not_fit_are_refused(wrong):
    _, inner, _ = setting(RULES["sgd"], 3)
    with pytest.raises(ValueError, match="with 3 inner steps they are 3 numbers of 0 or more"):
        om.exact(inner, step_weights=wrong)


@every_rule
def test_rematerialisation_changes_no_bit(rule):
    for steps in [*range(21), 128]:
        given, inner, meta = setting(rule, steps)
        found, plain = (om.exact(inner, rematerialise=on)(meta, given.task()) for on in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(plain), strict=True)), steps


@pytest.mark.parametrize("steps", [1, 7, 16, 17])
def test_rematerialisation_changes_no_bit_of_a_multi_step_loss(steps):
    given, inner, meta = setting(RULES["adam"], steps)
    weights = [1.0 + k % 3 for k in range(steps)]
    found, plain = (om.exact(inner, rematerialise=on, step_weights=weights)(meta, given.task()) for on in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(plain), strict=True))


def peak(steps, rule, *, rematerialise):
    """Return the peak memory in bytes of a trajectory that outweighs everything else, and the bytes of the weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    inner = om.Inner(om.model_loss(module, "mse"), rule, steps)
    batch = om.Batch(torch.randn(3, 48), torch.randn(3, 1))
    meta, gradient = inner.init(dict(module.named_parameters())), om.exact(inner, rematerialise=rematerialise)
    with MemoryMeter() as meter:
        gradient(meta, om.Task(batch, batch))
    return meter.peak, bytes_of(meta.weights)


@pytest.mark.parametrize(("rule", "tensors"), [(RULES["sgd"], 1), (RULES["momentum"], 2), (RULES["adam"], 3)])
def test_rematerialisation_needs_memory_of_the_order_of_the_root_of_the_steps(rule, tensors):
    few, many = 9, 49  # 3 + 3 and 7 + 7 points of the trajectory
    (first, weights), (last, _) = (peak(steps, rule, rematerialise=True) for steps in (few, many))
    assert last - first <= 1.1 * 8 * tensors * weights
    (first, _), (last, _) = (peak(steps, rule, rematerialise=False) for steps in (few, many))
    assert last - first >= 0.9 * (many - few) * tensors * weights
