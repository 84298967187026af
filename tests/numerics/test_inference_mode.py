"""Adaptation, scores and meta-gradients are the same under ``torch.inference_mode()``, of inference tensors, too."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
import online_meta.learners
from online_meta import registry
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import net, optimizer, setup_for, stream_for, task, weights_of
from online_meta.testing.oracle import unrolled_maml

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "outside": nullcontext}


def inference_tensors(tree):
    with torch.inference_mode():
        return tree_map(torch.clone, tree)


def setting():
    module = net()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 2)
    return module, inner, inner.init(weights_of(module))


def is_same(left, right):
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("given", ["plain", "inference tensors"])
@pytest.mark.parametrize("mode", MODES)
def test_the_adapted_weights_are_those_of_plain_autograd(mode, given):
    module, inner, meta = setting()
    one = task(3)
    right = weights_of(module)
    for _ in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in right.items()}
        x, y = one.support
        out = torch.tanh(x @ leaves["0.weight"].T + leaves["0.bias"]) @ leaves["2.weight"].T + leaves["2.bias"]
        grads = torch.autograd.grad(((out - y) ** 2).mean(), [*leaves.values()])
        right = {name: value - 0.1 * grad for (name, value), grad in zip(right.items(), grads, strict=True)}
    if given == "inference tensors":
        meta, one = inference_tensors((meta, one))
    with MODES[mode]():
        found = inner.adapt(meta, one.support)
    assert_close(found, right, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batching", ["loop", "vmap", "traced"])
def test_the_meta_gradient_over_tasks_is_that_of_the_unrolled_loop(batching, mode):
    module, inner, meta = setting()
    tasks = [task(seed) for seed in range(3)]
    each = [unrolled_maml(module, "mse", weights_of(module), one, lr=0.1, steps=2).grads.weights for one in tasks]
    right = {name: torch.stack([one[name] for one in each]).mean(0) for name in meta.weights}
    meta, tasks = inference_tensors((meta, tasks))
    with MODES[mode]():
        found = om.over_tasks(om.exact(inner), batching)(meta, tasks).grads.weights
    assert_close(found, right, 1e-10)


@pytest.mark.parametrize("name", registry.names(online_meta.learners))
def test_every_learner_plays_the_same_game_in_inference_mode(name):
    def play(mode):
        tasks = stream_for(name, 3)
        tasks = inference_tensors(tasks) if mode is torch.inference_mode else tasks
        with mode():
            learner = registry.load_module(online_meta.learners, name).build(setup_for(name))
            first = [(learner.score(one), learner.learn(one), learner.learn_more(0)) for one in tasks[:2]]
            saved = learner.save()
            learner.load(saved, 2)
        # The state that inference mode leaves behind serves outside of it.
        return [*first, (learner.score(tasks[2]), learner.learn(tasks[2]))], learner.save()

    found, right = (play(mode) for mode in (torch.inference_mode, nullcontext))
    assert found[0] == right[0]
    assert is_same(found[1], right[1])


def test_a_loss_and_an_optimizer_made_in_inference_mode_serve_outside_of_it():
    module = net()
    right = play_one(module)
    with torch.inference_mode():
        inside = net()
        inner = om.Inner(om.model_loss(inside, "mse"), om.rules.meta_sgd(lr=0.1), 2)
        meta = inner.init(dict(inside.named_parameters()))
        learner = om.FollowTheMetaLeader(inner, om.exact(inner), optimizer(meta))
        assert om.preflight(inner, meta, [task(0)]).problems == ()
    one = task(0)
    assert (learner.score(one), learner.learn(one)) == right


def play_one(module):
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.meta_sgd(lr=0.1), 2)
    one, meta = task(0), inner.init(weights_of(module))
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), optimizer(meta))
    return learner.score(one), learner.learn(one)
