"""A model that computes in bfloat16 inside an inner loop in float32."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import online_meta as om
from online_meta.meta_optimizer import flatten_meta
from online_meta.preflight.preflight import unrolled
from tests.numerics.problems import problem

NETWORKS = {"mlp_tanh": 0.999, "sequence_transformer": 0.999, "conv_batch_norm": 0.85}
"""The least cosine with the float32 meta-gradient: normalisation over few small images loses most."""


def single(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def setting(name, precision, rule=None):
    given = problem(name)
    task = om.Task(*(om.Batch(*map(single, batch)) for batch in given.task(0)))
    loss = om.model_loss(given.module.float(), given.loss, precision=precision)
    inner = om.Inner(loss, rule or om.rules.sgd(lr=0.1), steps=3)
    return inner, inner.init(dict(given.module.named_parameters())), task


def flat(found):
    return torch.cat([value.flatten().double() for value in flatten_meta(found.grads).values()])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_meta_gradient_has_the_direction_of_the_float32_one(name):
    low, full = (setting(name, precision) for precision in (torch.bfloat16, None))
    found, right = flat(om.exact(low[0])(*low[1:])), flat(om.exact(full[0])(*full[1:]))
    assert not torch.equal(found, right), "the model computes in bfloat16"
    assert cosine_similarity(found, right, dim=0) > NETWORKS[name]


@pytest.mark.parametrize("name", ["mlp_tanh", "sequence_transformer"])
def test_the_bfloat16_meta_gradient_is_of_second_order(name):
    """The unrolled graph of the same model rounds in the same way; the first-order gradient is farther away."""
    inner, meta, task = setting(name, torch.bfloat16)
    found, right = flat(om.exact(inner)(meta, task)), flat(unrolled(inner, meta, task))
    first = flat(om.first_order(inner)(meta, task))
    assert (found - right).norm() < 0.1 * (first - right).norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_gradients_stay_in_single_precision(name):
    inner, meta, task = setting(name, torch.bfloat16, om.rules.meta_sgd(lr=0.1))
    found = om.exact(inner)(meta, task)
    assert {
        value.dtype for value in (*flatten_meta(found.grads).values(), *inner.adapt(meta, task.support).values())
    } == {torch.float32}
    assert found.loss.dtype == torch.float32


def test_an_inner_step_below_bfloat16_resolution_is_not_lost():
    """The next bfloat16 number after 1 is 1.0078."""
    inner, meta, task = setting("mlp_tanh", torch.bfloat16, om.rules.sgd(lr=1e-4))
    adapted = inner.adapt(meta, task.support)
    assert all(not torch.equal(adapted[name], value) for name, value in meta.weights.items() if value.abs().max() > 0)
    assert torch.bfloat16 not in {value.dtype for value in adapted.values()}


def test_tokens_stay_integers():
    inner, meta, task = setting("tokens_transformer", torch.bfloat16)
    assert torch.isfinite(om.exact(inner)(meta, task).loss)
