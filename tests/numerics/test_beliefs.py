"""Beliefs of random rules: which draws they have, and what is refused."""

from dataclasses import replace

import pytest
import torch

import online_meta as om
from online_meta.answers import believe_by_inner_loop
from online_meta.testing.learned_rules import draws_by_key
from tests.numerics.problems import problem


def setting(rule, **fields):
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 2, **fields)
    return inner, inner.init(given.weights()), given.task().support


def test_fewer_samples_are_the_first_of_more():
    inner, meta, support = setting(draws_by_key(), posterior=om.posteriors.samples(), samples=5)
    (many,), (few,) = inner.believe(meta, support), replace(inner, samples=2).believe(meta, support)
    for name, value in few.params.items():
        assert torch.equal(value, many.params[name][:2])
    assert few.log_weights.exp().tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_samples_of_a_gaussian_view_have_its_mean_and_deviation():
    """The model is called with m + exp(log_std) eps; without steps, m are the weights and the deviation is exp(-2)."""
    inner, meta, support = setting(
        om.rules.bayes_by_gradient(log_std=-2.0), posterior=om.posteriors.samples(), samples=400
    )
    (belief,) = inner.believe(meta, support, (0,))
    noise = torch.cat([((value - meta.weights[n]) / torch.e**-2).flatten(1) for n, value in belief.params.items()], 1)
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert float(noise.std()) == pytest.approx(1.0, abs=4 / (2 * noise.numel()) ** 0.5)
    assert len({one.item() for one in noise.flatten()}) == noise.numel()


@pytest.mark.parametrize("rule", [om.rules.sgd(), om.rules.mt_net()], ids=["sgd", "mt_net"])
def test_samples_of_a_rule_that_draws_nothing_by_key_are_refused(rule):
    inner, meta, support = setting(rule, posterior=om.posteriors.samples(), samples=3)
    with pytest.raises(ValueError, match=r'needs a rule that draws by key .* use posterior = "point"'):
        inner.believe(meta, support)


def test_several_samples_of_a_point_are_refused():
    inner, meta, support = setting(om.rules.sgd(), samples=3)
    with pytest.raises(ValueError, match='samples is 3: posterior = "point" has 1 sample; use "samples" for more'):
        inner.believe(meta, support)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"answer_steps": (1, -1)}, r"answer_steps are \[1, -1\]: each is 0 or more"),
        ({"answer_heads": ("sgd",)}, "'sgd' makes no head in closed form: .*known: logistic_head, nearest_centroid, "),
        ({"answer_heads": ("ridge",)}, "has no 'ridge': did you mean 'ridge_head'"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        setting(om.rules.sgd(), **fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"rule": draws_by_key(), "posterior": om.posteriors.samples(), "samples": 2}],
    ids=["point", "samples"],
)
def test_the_answer_of_a_head_is_that_of_its_rule_without_steps(fields):
    """From the weights at which the learner's own inner loop starts; a mixture has a head for each of its samples."""
    heads = ("ridge_head", "nearest_centroid", "logistic_head")
    given = problem("conv_group_norm")
    loss, task = om.model_loss(given.module, given.loss), given.task()
    inner = om.Inner(loss, **{"rule": om.rules.sgd(), **fields}, steps=2, answer_steps=(0,), answer_heads=heads)
    meta = inner.init(given.weights())
    found = believe_by_inner_loop(inner, meta, task.support)
    assert list(found) == ["", "@0", "@ridge_head", "@nearest_centroid", "@logistic_head"]
    for head in heads:
        rule = getattr(om.rules, head)()
        own = om.Inner(loss, rule, 0)
        for sample in range(inner.samples):
            start = {name: values[sample] for name, values in found["@0"].params.items()}
            right = own.adapt(om.Meta(start, rule.init(start)), task.support)
            assert not torch.equal(right["head.weight"], start["head.weight"])
            for name, value in right.items():
                assert torch.equal(found[f"@{head}"].params[name][sample], value)
        assert torch.equal(found[f"@{head}"].log_weights, found[""].log_weights)
