"""Second derivatives that are silently wrong in plain torch, and what this package does instead.

Each test shows the error in the installed torch, so that it fails when torch is fixed, and that ours is right.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import online_meta as om
from online_meta.inner import query_loss
from online_meta.testing.compare import assert_close, flat, relative_error
from online_meta.testing.oracle import central_difference, unrolled_maml
from tests.numerics.problems import RANDOM, problem, regression_task
from tests.numerics.unsafe import between

LR = 0.1
STEPS = 2
NORMS = ["conv_batch_norm", "conv_layer_norm", "conv_instance_norm", "layer_norm"]
WRONG = 1e-4


def raw_loss(module, loss):
    """Return the loss of a module with only ``functional_call``."""
    criterion = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}[loss]
    return lambda params, batch: criterion(functional_call(module, dict(params), (batch.x,)), batch.y)


def ours(module, loss, weights, task, steps=STEPS):
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)
    return om.exact(inner)(inner.init(weights), task).grads.weights


def random_direction(weights, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(w.shape, generator=random, dtype=w.dtype) for n, w in weights.items()}


def slope_of_adapted(module, loss, weights, task, along, steps=STEPS):
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)

    def adapted_loss(weights):
        meta = om.Meta(weights, {})
        return query_loss(inner, meta, inner.adapt(meta, task.support), task.query)

    return central_difference(adapted_loss, weights, along)


def assert_is_the_slope(found, module, loss, weights, task):
    for seed in range(3):
        along = random_direction(weights, seed)
        slope = slope_of_adapted(module, loss, weights, task, along)
        assert float(flat(found) @ flat(along)) == pytest.approx(slope, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", NORMS)
def test_torch_is_wrong_in_reverse_over_forward_through_normalisations(name):
    """grad of jvp should be H v; the forward derivative of the norms cannot be differentiated, without an error."""
    module, loss, make_task = given = problem(name)
    weights, batch = given.weights(), make_task().support
    along = random_direction(weights)
    objective = raw_loss(module, loss)

    def reverse(weights):
        return torch.func.grad(objective)(weights, batch)

    right = central_difference_of(reverse, weights, along)
    over_forward = torch.func.grad(
        lambda weights: torch.func.jvp(lambda w: objective(w, batch), (weights,), (along,))[1]
    )(weights)
    over_reverse = torch.func.grad(lambda weights: flat(reverse(weights)) @ flat(along))(weights)
    assert relative_error(over_forward, right) > WRONG
    assert relative_error(over_reverse, right) < 1e-6
    assert_is_the_slope(ours(module, loss, weights, make_task()), module, loss, weights, make_task())


def central_difference_of(function, at, along, width=1e-7):
    ahead = function({n: v + width * along[n] for n, v in at.items()})
    behind = function({n: v - width * along[n] for n, v in at.items()})
    return {n: (ahead[n] - behind[n]) / (2 * width) for n in at}


@pytest.mark.parametrize("name", NORMS)
def test_torch_is_wrong_in_grad_of_vmap_of_grad_through_normalisations(name):
    """The sum of meta-gradients over tasks is right as ``vmap(grad(...))`` and wrong as ``grad(vmap(...))``."""
    module, loss, make_task = given = problem(name)
    weights, tasks = given.weights(), [make_task(seed) for seed in range(3)]
    objective = raw_loss(module, loss)
    stacked = om.Task(
        *(
            om.Batch(*(torch.stack([getattr(getattr(t, part), f) for t in tasks]) for f in "xy"))
            for part in om.Task._fields
        )
    )

    def adapted_query_loss(weights, task):
        phi = weights
        for _ in range(STEPS):
            grads = torch.func.grad(objective)(phi, task.support)
            phi = {n: value - LR * grads[n] for n, value in phi.items()}
        return objective(phi, task.query)

    outside = torch.func.grad(lambda w: torch.func.vmap(adapted_query_loss, (None, 0))(w, stacked).sum())(weights)
    inside = torch.func.vmap(torch.func.grad(adapted_query_loss), (None, 0))(weights, stacked)
    right = [unrolled_maml(module, loss, weights, task, lr=LR, steps=STEPS).grads.weights for task in tasks]
    total = {n: sum(one[n] for one in right) for n in weights}
    assert relative_error(outside, total) > WRONG
    assert relative_error({n: g.sum(0) for n, g in inside.items()}, total) < 1e-10
    for task, one in zip(tasks, right, strict=True):
        assert_close(ours(module, loss, weights, task), one, 1e-10)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_torch_is_wrong_in_the_double_backward_of_weight_norm(normed):
    """Every meta-gradient through it is wrong, ours and the unrolled one; only refusing the model helps."""
    torch.manual_seed(0)
    module = normed(nn.Linear(4, 2)).double()
    weights = {n: w.detach().clone() for n, w in module.named_parameters()}
    task, along = regression_task(), random_direction(weights)
    grads = unrolled_maml(module, "mse", weights, task, lr=LR, steps=STEPS).grads.weights
    right = slope_of_adapted_raw(module, weights, task, along)
    assert abs(float(flat(grads) @ flat(along)) - right) > 1e-3 * abs(right)
    inner = om.Inner(raw_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)
    (found_problem,) = om.preflight(inner, om.Meta(weights, {}), [task]).problems
    assert "weight normalisation" in found_problem


def slope_of_adapted_raw(module, weights, task, along):
    inner = om.Inner(raw_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)

    def adapted_loss(weights):
        return inner.loss(inner.adapt(om.Meta(weights, {}), task.support), task.query)

    return central_difference(adapted_loss, weights, along)


def test_weight_norm_over_the_whole_weight_is_right():
    """Preflight advises this form instead."""
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2), dim=None).double()
    weights = {n: w.detach().clone() for n, w in module.named_parameters()}
    assert_is_the_slope(ours(module, "mse", weights, regression_task()), module, "mse", weights, regression_task())


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_without_reseeding_gives_the_gradient_of_another_loss(name):
    """The adjoint computes each step twice: with new masks in the backward pass its result is silently wrong."""
    module, loss, make_task = given = problem(name)
    weights, task = given.weights(), make_task()
    seeded = ours(module, loss, weights, task)
    assert_close(seeded, unrolled_maml(module, loss, weights, task, lr=LR, steps=STEPS).grads.weights, 1e-10)
    torch.manual_seed(0)
    inner = om.Inner(om.model_loss(module, loss, random=False), om.rules.sgd(lr=LR), STEPS)
    unseeded = om.exact(inner)(inner.init(weights), task).grads.weights
    assert relative_error(unseeded, seeded) > 1e-2
    (found_problem,) = om.preflight(inner, inner.init(weights), [task]).problems
    assert "repeated calls give different losses" in found_problem


class Checkpointed(nn.Module):
    """A model that recomputes its body in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=False))


def test_torch_is_wrong_in_a_checkpoint_under_functional_call():
    """The backward pass reads the module's own weights. Ours has none: it raises, and preflight explains why."""
    torch.manual_seed(0)
    module = Checkpointed().double()
    weights = {n: torch.randn_like(w) for n, w in module.named_parameters()}
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    batch = regression_task().support
    found = torch.autograd.grad(raw_loss(module, "mse")(leaves, batch), [*leaves.values()])
    right = torch.func.grad(lambda w: F.mse_loss(reference_output(w, batch.x), batch.y))(weights)
    assert relative_error(dict(zip(leaves, found, strict=True)), right) > 1e-2

    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)
    with pytest.raises(RuntimeError, match="device meta"):
        om.exact(inner)(om.Meta(weights, {}), regression_task())
    for loss in (inner.loss, raw_loss(module, "mse")):
        tried = om.Inner(loss, inner.rule, STEPS)
        (found_problem,) = om.preflight(tried, om.Meta(weights, {}), [regression_task()]).problems
        assert "layer 'body' (Linear) is computed again while going back (torch.utils.checkpoint)" in found_problem


def reference_output(weights, x):
    hidden = torch.tanh(F.linear(x, weights["body.weight"], weights["body.bias"]))
    return F.linear(hidden, weights["head.weight"], weights["head.bias"])


def test_rematerialise_replaces_checkpoints():
    """Preflight advises this option instead."""
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 5)
    meta = inner.init(given.weights())
    found, right = (om.exact(inner, rematerialise=again)(meta, make_task()) for again in (True, False))
    assert_close(found.grads.weights, right.grads.weights, 1e-12)


def test_the_default_attention_kernel_cannot_be_differentiated_twice():
    """Torch raises an error; ours uses the math kernel, which can be differentiated twice, for any loss."""
    module, loss, make_task = given = problem("sequence_attention")
    weights, task = given.weights(), make_task()
    inner = om.Inner(raw_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    plain, leaves = raw_loss(module, loss), {name: value.clone().requires_grad_() for name, value in weights.items()}
    grads = torch.autograd.grad(plain(leaves, task.support), [*leaves.values()], create_graph=True)
    square = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match=r"scaled_dot_product.* is not implemented"):
        torch.autograd.grad(square, [*leaves.values()])
    of_raw = om.exact(inner)(inner.init(weights), task).grads.weights
    assert_close(of_raw, unrolled_maml(module, loss, weights, task, lr=LR, steps=STEPS).grads.weights, 1e-10)
    found = ours(module, loss, weights, task)
    assert_close(found, unrolled_maml(module, loss, weights, task, lr=LR, steps=STEPS).grads.weights, 1e-10)


def test_running_statistics_are_not_a_function_of_the_weights():
    """Under ``torch.func`` torch raises; in plain autograd a loss changes its module. Preflight refuses both."""
    torch.manual_seed(0)
    module = between(nn.BatchNorm1d(6)).double()
    weights = {n: w.detach().clone() for n, w in module.named_parameters()}
    batch, before = regression_task().support, module[2].running_mean.clone()
    with pytest.raises(RuntimeError, match="in-place operation"):
        torch.func.vmap(torch.func.grad(raw_loss(module, "mse")), (None, 0))(
            weights, om.Batch(*(t[None] for t in batch))
        )
    raw_loss(module, "mse")(weights, batch)
    assert not torch.equal(module[2].running_mean, before)
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)
    (found_problem,) = om.preflight(inner, om.Meta(weights, {}), [regression_task()]).problems
    assert "layer '2' (BatchNorm1d) keeps running statistics" in found_problem


def test_frozen_running_statistics_are_accepted():
    torch.manual_seed(0)
    module = between(nn.BatchNorm1d(6)).double().eval()
    weights = {n: w.detach().clone() for n, w in module.named_parameters()}
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)
    assert om.preflight(inner, om.Meta(weights, {}), [regression_task()]).problems == ()
