"""What every posterior of ``online_meta.posteriors`` keeps."""

from dataclasses import replace

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves

import online_meta as om
import online_meta.posteriors
from online_meta import registry
from online_meta.inner import init_carry
from online_meta.testing.compare import assert_close
from online_meta.testing.test_rules import EVERY, setting

POSTERIORS = {name: registry.load(online_meta.posteriors, name) for name in registry.names(online_meta.posteriors)}
RULES = ("sgd", "t_net", "seam_support", "seam_keyed", "svgd", "svgd_of_three")
DRAWS = {"laplace"}
"""Draw several samples of any rule, and none if there is one sample."""
STOPS = (0, 1, 4)


def believing(name, rule, samples):
    """Return an inner loop, its meta-parameters and a task, or None if the posterior refuses them."""
    _, inner, meta, task = setting("mlp_tanh", EVERY[rule](), 4)
    inner = replace(inner, posterior=POSTERIORS[name](), samples=samples, seed=7)
    try:
        inner.believe(meta, task.support)
    except ValueError:
        return None
    return inner, meta, task


CASES = [
    (name, rule, samples)
    for name in POSTERIORS
    for rule in RULES
    for samples in (1, 3)
    if believing(name, rule, samples) is not None
]
"""Each posterior with each of some rules, and with one and several samples, if it takes them."""

every_case = pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])


def same_bits(found, right):
    """Return whether two trees of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True))


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_takes_some_rule(name):
    assert any(case[0] == name for case in CASES)


@every_case
def test_a_belief_has_the_weights_names_and_normalised_log_weights(case):
    inner, meta, task = believing(*case)
    (belief,) = inner.believe(meta, task.support)
    (size,) = belief.log_weights.shape
    torch.testing.assert_close(belief.log_weights.exp().sum(), torch.ones((), dtype=torch.float64))
    assert list(belief.params) == list(meta.weights)
    for name, value in belief.params.items():
        assert value.shape == (size, *meta.weights[name].shape)
        assert value.dtype == meta.weights[name].dtype
        assert value.isfinite().all()
        assert not value.requires_grad


@every_case
def test_it_is_a_pure_function(case):
    inner, meta, task = believing(*case)
    given = tree_leaves((meta, task.support.x, task.support.y))
    before = [(value._version, value.clone()) for value in given]
    torch.manual_seed(1)
    first = inner.believe(meta, task.support, STOPS)
    torch.manual_seed(2)
    copy = om.Batch(task.support.x.clone(), task.support.y.clone())
    assert same_bits(inner.believe(meta, copy, STOPS), first)
    for value, (version, kept) in zip(given, before, strict=True):
        assert value._version == version
        assert torch.equal(value, kept)


@every_case
def test_the_first_sample_is_what_adapt_returns_and_the_only_one_of_a_point(case):
    inner, meta, task = believing(*case)
    if inner.samples == 1:
        (belief,) = inner.believe(meta, task.support)
        assert same_bits({n: value[0] for n, value in belief.params.items()}, inner.adapt(meta, task.support))
        assert torch.equal(belief.log_weights, torch.zeros(1, dtype=torch.float64))


@every_case
def test_several_stops_share_one_trajectory_and_equal_single_ones(case):
    inner, meta, task = believing(*case)
    calls = []

    def counted(params, x):
        calls.append(1)
        return inner.loss.output(params, x)

    watched = replace(inner, loss=replace(inner.loss, training=counted))
    together = watched.believe(meta, task.support, STOPS)
    assert len(together) == len(STOPS)
    shared = len(calls)
    for stop, belief in zip(STOPS, together, strict=True):
        calls.clear()
        assert same_bits(belief, watched.believe(meta, task.support, (stop,))[0])
        assert same_bits(belief, replace(inner, steps=stop).believe(meta, task.support)[0])
    assert shared == len(calls)


@every_case
def test_a_support_set_without_rows_takes_no_step(case):
    inner, meta, task = believing(*case)
    if case[1] == "seam_support":  # It reads a mean of the support set, of which there is none.
        return
    nothing = om.Batch(task.support.x[:0], task.support.y[:0])
    still, moved = inner.believe(meta, nothing, (0, 4))
    assert same_bits(still, moved)
    assert all(value.isfinite().all() for value in still.params.values())
    start = init_carry(inner, meta, nothing).phi
    if inner.rule.view(meta.rule, start) is start and not (case[0] in DRAWS and inner.samples > 1):
        assert same_bits({name: value[0] for name, value in moved.params.items()}, start)
    gradient = om.exact(inner)(meta, om.Task(nothing, task.query)).grads
    assert same_bits(gradient, om.exact(replace(inner, steps=0))(meta, om.Task(nothing, task.query)).grads)


@pytest.mark.parametrize("rule", [rule for name, rule, samples in CASES if (name, samples) == ("point", 1)])
def test_the_order_of_the_support_set_does_not_matter_to_a_point(rule):
    inner, meta, task = believing("point", rule, 1)
    if inner.rule.random:  # Its numbers are a function of the bytes.
        return
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = om.Batch(task.support.x[order], task.support.y[order])
    assert_close(inner.adapt(meta, permuted), inner.adapt(meta, task.support), 1e-12)


@every_case
def test_samples_and_seeds_differ_if_the_rule_draws(case):
    inner, meta, task = believing(*case)
    draws = bool(inner.rule.random) or (case[0] in DRAWS and inner.samples > 1)
    (belief,), (other,) = (replace(inner, seed=seed).believe(meta, task.support) for seed in (7, 8))
    assert same_bits(belief, other) is not draws
    for value in belief.params.values():
        assert len({tuple(one.flatten().tolist()) for one in value}) == len(value)


@every_case
def test_tasks_can_be_vectorised(case):
    inner, meta, task = believing(*case)
    other = setting("mlp_tanh", EVERY[case[1]]())[0].task(5)
    x, y = (torch.stack(pair) for pair in zip(task.support, other.support, strict=True))
    together = vmap(lambda x, y: inner.believe(meta, om.Batch(x, y), STOPS))(x, y)
    for row, support in enumerate((task.support, other.support)):
        for found, right in zip(together, inner.believe(meta, support, STOPS), strict=True):
            assert_close({n: value[row] for n, value in found.params.items()}, right.params, 1e-10)


@every_case
@pytest.mark.parametrize("stops", [(), (2, 1), (1, 1), (-1,)])
def test_stops_ascend(case, stops):
    inner, meta, task = believing(*case)
    with pytest.raises(ValueError, match="give one or more that ascend"):
        inner.believe(meta, task.support, stops)
