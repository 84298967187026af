"""``begin = "fresh"``: each task starts from weights of its own, drawn like an initialisation."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import vmap

import online_meta as om
from online_meta.inner import init_carry
from online_meta.metagrads.warp_grad import warp_grad
from online_meta.preflight.preflight import unrolled
from online_meta.testing.compare import assert_close
from online_meta.testing.learned_rules import whole_seam
from tests.numerics.problems import problem, regression_task
from tests.numerics.reference_loop import check_slope, join_parts, shifted


def setting(rule=None, fast=("*",), **fields):
    given = problem("mlp_tanh")
    inner = om.Inner(
        om.model_loss(given.module, given.loss), rule or om.rules.sgd(lr=0.1), 3, fast, begin="fresh", **fields
    )
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule))


def start(inner, meta, seed):
    return init_carry(inner, meta, regression_task(seed).support).phi


def test_two_tasks_start_differently_and_the_same_task_the_same():
    _, inner, meta = setting()
    first, again, other = (start(inner, meta, seed) for seed in (0, 0, 1))
    seeded = start(replace(inner, seed=1), meta, 0)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert value.shape == meta.weights[name].shape
        for different in (other[name], seeded[name], meta.weights[name]):
            assert not torch.equal(value, different)


def test_under_vmap_tasks_start_with_the_same_bits():
    _, inner, meta = setting()
    batches = [regression_task(seed).support for seed in range(4)]
    x, y = (torch.stack(parts) for parts in zip(*batches, strict=True))
    together = vmap(lambda x, y: init_carry(inner, meta, om.Batch(x, y)).phi)(x, y)
    for row, batch in enumerate(batches):
        one = init_carry(inner, meta, batch).phi
        assert all(torch.equal(value[row], one[name]) for name, value in together.items())


def test_fresh_weights_have_the_statistics_of_the_models_own():
    torch.manual_seed(4)
    layer = nn.Linear(300, 200).double()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.5)
        nn.init.constant_(layer.bias, 0.1)
    inner = om.Inner(om.model_loss(layer, "mse"), om.rules.sgd(), 1, begin="fresh")
    meta = inner.init(dict(layer.named_parameters()))
    phi = init_carry(inner, meta, om.Batch(torch.ones(2, 300), torch.ones(2, 200))).phi
    drawn, own = phi["weight"], meta.weights["weight"]
    assert float(drawn.mean()) == pytest.approx(float(own.mean()), abs=4 * float(own.std()) / own.numel() ** 0.5)
    assert float(drawn.std()) == pytest.approx(float(own.std()), rel=4 / (2 * own.numel()) ** 0.5)
    assert torch.equal(phi["bias"], meta.weights["bias"])


@pytest.mark.parametrize("rule", [om.rules.sgd(lr=0.1), whole_seam(lr=0.1)], ids=["sgd", "whole_seam"])
@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
def test_the_weights_that_adapt_have_no_gradient_and_all_others_their_slope(rule, fast):
    given, inner, meta = setting(rule, fast)
    task = given.task()
    found = om.exact(inner)(meta, task)
    adapts = [name for name in meta.weights if fast == ("*",) or name.startswith("head.")]
    assert not any(found.grads.weights[name].any() for name in adapts)
    assert all(grad.any() for name, grad in found.grads.weights.items() if name not in adapts)
    assert all(grad.any() for grad in found.grads.rule.values())
    assert_close(join_parts(found.grads), join_parts(unrolled(inner, meta, task).grads), 1e-10)

    class Constant:
        """The inner loop with the weights that adapt held constant: they set the scale of the fresh ones."""

        loss = inner.loss

        @staticmethod
        def adapt(moved, support):
            return inner.adapt(om.Meta({**moved.weights, **{n: meta.weights[n] for n in adapts}}, moved.rule), support)

    check_slope(Constant, meta, task, found)


def test_samples_of_a_plain_rule_differ_by_their_start():
    _, inner, meta = setting(posterior=om.posteriors.samples(), samples=3)
    (belief,) = inner.believe(meta, regression_task().support)
    for value in belief.params.values():
        assert not torch.equal(value[0], value[1])
        assert not torch.equal(value[1], value[2])


@pytest.mark.parametrize("estimator", [om.reptile, warp_grad])
def test_estimators_that_move_the_start_are_refused(estimator):
    with pytest.raises(ValueError, match='begin = "fresh" draws them anew: use begin = "weights"'):
        estimator(setting()[1])
    assert warp_grad(setting()[1], initialisation="first_order")


def test_an_unknown_begin_is_refused():
    with pytest.raises(ValueError, match="begin is 'random'"):
        replace(setting()[1], begin="random")
