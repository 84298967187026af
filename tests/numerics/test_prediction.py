"""Predictions of several outputs and several families, with weights, and of losses of the user's own."""

import math

import pytest
import torch
from torch.nn import functional as F

import online_meta as om
from online_meta import outcomes, registry
from online_meta.outcomes import outcome_of
from online_meta.prediction import (
    accuracy_of_prediction,
    cdf_of,
    loss_of,
    mean_of,
    mix,
    nll_of,
    point,
    pool,
    probabilities_of,
)
from online_meta.types import Component, Outcome

DOUBLE = torch.float64


def build(name, **options):
    return registry.load(outcomes, name)(**options)


def draw(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def squared_rows(output, y):
    return ((output - y) ** 2).flatten(1).sum(1)


def squared(output, y):
    return squared_rows(output, y).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_output_loses_what_torch_says_to_the_bit(dtype):
    output, y, classes = torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype), torch.randint(5, (7,))
    assert torch.equal(loss_of(point(build("mse"), output), y), F.mse_loss(output, y))
    assert torch.equal(loss_of(point(build("cross_entropy"), output), classes), F.cross_entropy(output, classes))
    assert torch.equal(loss_of(point(outcome_of(squared), output), y), squared(output, y))
    assert torch.equal(loss_of(point(outcome_of(squared_rows), output), y), squared_rows(output, y).mean())


def test_outputs_are_pooled_where_the_outcome_can():
    outputs, y, classes = draw(3, 6, 2), draw(6, 2), torch.randint(2, (6,))
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    squares = (Component(build("mse"), outputs, weights.log()),)
    torch.testing.assert_close(loss_of(squares, y), F.mse_loss(torch.einsum("s,sni->ni", weights, outputs), y))
    classified = (Component(build("cross_entropy"), outputs, weights.log()),)
    mixture = torch.einsum("s,snc->nc", weights, outputs.softmax(-1))
    torch.testing.assert_close(loss_of(classified, classes), F.nll_loss(mixture.log(), classes))
    torch.testing.assert_close(probabilities_of(classified), mixture)


def test_learners_of_one_outcome_are_pooled_as_one_family():
    first, second, y = draw(6, 2), draw(6, 2), draw(6, 2)
    both = mix([point(build("mse"), first), point(build("mse"), second)], [math.log(3), 0.0])
    assert [len(part.log_weights) for part in pool(both)] == [1]
    torch.testing.assert_close(loss_of(both, y), F.mse_loss(0.75 * first + 0.25 * second, y))
    checked = build("mse")._replace(loss=lambda output, y: F.mse_loss(output, y))
    both = mix([point(checked, first), point(build("mse"), second)], [math.log(3), 0.0])
    torch.testing.assert_close(loss_of(both, y), F.mse_loss(0.75 * first + 0.25 * second, y))


def test_a_pooled_family_keeps_its_weight_among_others():
    outputs, y = draw(3, 6, 2), torch.randint(2, (6,))
    names = ("cross_entropy", "cross_entropy", "categorical")
    parts = [point(build(name), output) for name, output in zip(names, outputs, strict=True)]
    mixed = mix(parts, torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE).log())
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    expected = F.nll_loss(torch.einsum("s,snc->nc", weights, outputs.softmax(-1)).log(), y, reduction="none")
    torch.testing.assert_close(nll_of(mixed, y), expected)


def test_families_are_mixed_by_their_likelihoods():
    mean, both, y = draw(6, 1), draw(2, 6, 2), draw(6, 1)
    narrow, wide = build("gaussian_of_noise", sigma=0.5), build("gaussian")
    inner = (Component(wide, both, torch.tensor([0.25, 0.75], dtype=DOUBLE).log()),)
    mixed = mix([point(narrow, mean), inner], torch.tensor([0.4, 0.6], dtype=DOUBLE).log() + 5.0)
    weights, std = torch.tensor([0.4, 0.15, 0.45], dtype=DOUBLE), 1e-3 + (1 + both[..., 1].exp()).log()
    normal = torch.distributions.Normal(
        torch.stack([mean[:, 0], *both[..., 0]]), torch.stack([torch.full((6,), 0.5, dtype=DOUBLE), *std])
    )
    expected = -(weights @ normal.log_prob(y[:, 0]).exp()).log()
    torch.testing.assert_close(nll_of(mixed, y), expected)
    torch.testing.assert_close(loss_of(mixed, y), expected.mean())
    torch.testing.assert_close(cdf_of(mixed, y)[:, 0], weights @ normal.cdf(y[:, 0]))
    torch.testing.assert_close(mean_of(mixed)[:, 0], weights @ normal.mean)
    weight = torch.arange(6.0, dtype=DOUBLE)
    torch.testing.assert_close(loss_of(mixed, y, weight), (weight @ expected) / weight.sum())
    with pytest.raises(AssertionError):  # The mean of losses is not the loss of the mixture.
        torch.testing.assert_close(loss_of(mixed, y), (weights @ -normal.log_prob(y[:, 0])).mean())


def test_weights_far_below_one_and_zero_are_exact():
    outputs, y = draw(6, 1), draw(6, 1)
    outcome = build("gaussian_of_noise")
    none = mix([point(outcome, outputs), point(outcome, outputs + 1)], [0.0, -math.inf])
    torch.testing.assert_close(nll_of(none, y), outcome.nll(outputs, y))
    far = mix([point(outcome, outputs), point(outcome, outputs + 100)], [-800.0, 0.0])
    assert bool(torch.isfinite(nll_of(far, y)).all())
    torch.testing.assert_close(nll_of(far, y), outcome.nll(outputs, y) + 800.0)


def test_a_loss_that_is_no_likelihood_mixes_with_no_other_family():
    y = draw(6, 1)
    other = point(build("gaussian"), draw(6, 2))
    with pytest.raises(ValueError, match=r"kind 1 is a loss without one: use .*gaussian_of_noise"):
        loss_of(mix([point(build("mse"), y), other], [0.0, 0.0]), y)
    with pytest.raises(ValueError, match="kind 2 is a loss without one"):
        nll_of(mix([other, point(outcome_of(squared), y)], [0.0, 0.0]), y)
    rows = mix([other, point(outcome_of(squared_rows), y)], [0.0, 0.0])
    expected = -(0.5 * (-other[0].outcome.nll(other[0].outputs[0], y)).exp() + 0.5).log()
    torch.testing.assert_close(nll_of(rows, y), expected)


def test_a_scalar_loss_of_the_users_own_is_averaged_over_outputs_and_takes_no_weights():
    first, second, y = draw(6, 2), draw(6, 2), draw(6, 2)
    outcome = outcome_of(squared)
    both = mix([point(outcome, first), point(outcome_of(squared), second)], [math.log(3), 0.0])
    torch.testing.assert_close(loss_of(both, y), 0.75 * squared(first, y) + 0.25 * squared(second, y))
    for refused in (lambda: nll_of(both, y), lambda: loss_of(both, y, torch.ones(6))):
        with pytest.raises(ValueError, match=r"return the losses of the rows, \(6,\)"):
            refused()
    rows = mix([point(outcome_of(squared_rows), one) for one in (first, second)], [math.log(3), 0.0])
    expected = -(0.75 * (-squared_rows(first, y)).exp() + 0.25 * (-squared_rows(second, y)).exp()).log()
    torch.testing.assert_close(loss_of(rows, y), expected.mean())
    weight = torch.arange(6.0, dtype=DOUBLE)
    torch.testing.assert_close(loss_of(rows, y, weight), (weight @ expected) / weight.sum())


def test_an_error_of_a_checked_loss_is_not_replaced():
    def refuse(output, y):
        raise ValueError("the check's own words")

    for name in ("mse", "cross_entropy"):
        with pytest.raises(ValueError, match="the check's own words"):
            loss_of(point(build(name)._replace(loss=refuse), draw(6, 2)), draw(5, 1))


@pytest.mark.parametrize("returned", [torch.zeros(5), torch.zeros(6, 1), "0", None])
def test_a_loss_that_is_neither_of_rows_nor_a_scalar_is_refused(returned):
    outcome = outcome_of(lambda output, y: returned)
    with pytest.raises(ValueError, match="the loss returns a"):
        loss_of(point(outcome, draw(6, 1)), draw(6, 1))


def test_an_outcome_with_a_loss_and_no_pool_averages_its_losses():
    outcome = Outcome(lambda output, y: (output - y).abs().sum(1), lambda output: output, loss=F.l1_loss)
    first, second, y = draw(6, 1), draw(6, 1), draw(6, 1)
    both = mix([point(outcome, first), point(outcome, second)], [0.0, 0.0])
    torch.testing.assert_close(loss_of(both, y), (F.l1_loss(first, y) + F.l1_loss(second, y)) / 2)
    torch.testing.assert_close(loss_of(both, y, torch.ones(6)), loss_of(both, y))


def test_weights_and_ignored_classes_count_entries_as_the_unweighted_loss_does():
    output, y = draw(4, 3, 5), torch.randint(3, (4, 5))
    y[0], y[1, 2:] = -100, -100
    for name in ("cross_entropy", "categorical"):
        prediction = point(build(name), output)
        torch.testing.assert_close(loss_of(prediction, y, torch.ones(4)), loss_of(prediction, y))
        weight = torch.tensor([3.0, 1.0, 0.0, 1.0])
        left = [1, 3]
        torch.testing.assert_close(
            loss_of(prediction, y, weight), loss_of(point(build(name), output[left]), y[left]), rtol=1e-6, atol=0
        )
    soft, prediction = torch.rand(4, 3, 5).softmax(1), point(build("cross_entropy"), output)
    torch.testing.assert_close(loss_of(prediction, soft), F.cross_entropy(output, soft))
    torch.testing.assert_close(loss_of(prediction, soft, torch.ones(4)), F.cross_entropy(output, soft))
    broken = output.clone()
    broken[2] = math.nan
    assert bool(torch.isfinite(loss_of(point(build("cross_entropy"), broken), y, weight)))


def test_accuracy_is_that_of_the_output_for_one_and_of_the_mixture_for_several():
    accuracy = om.accuracy_of(lambda params, x: x)
    for shape, classes in (((8, 3), (8,)), ((8, 3, 5), (8, 5)), ((8, 5, 3), (8, 5))):
        output, y = torch.randn(shape), torch.randint(3, classes)
        y.view(-1)[:2] = -100
        for outcome in (build("cross_entropy"), outcome_of(squared)):
            if shape[1] == 3 or outcome != build("cross_entropy"):
                found = accuracy_of_prediction(point(outcome, output), y)
                assert float(found) == float(accuracy({}, om.Batch(output, y)))
    # Each output is sure of another class, and together they prefer the third one.
    outputs = torch.tensor([[[0.55, 0.0, 0.45]], [[0.0, 0.55, 0.45]]]).log()
    both = (Component(build("categorical"), outputs, torch.tensor([0.5, 0.5]).log()),)
    assert float(accuracy_of_prediction(both, torch.tensor([2]))) == 1.0
    weight = torch.tensor([3.0, 1.0])
    one = point(build("categorical"), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert float(accuracy_of_prediction(one, torch.tensor([1, 1]), weight=weight)) == 0.75


def test_close_logits_are_not_made_equal():
    output = torch.tensor([[0.0, 1e-9], [100.0, 100.0 + 1e-5]])
    y = output.argmax(1)
    assert float(accuracy_of_prediction(point(build("cross_entropy"), output), y)) == 1.0


def test_labels_have_an_accuracy_each():
    output, y = torch.tensor([[2.0, -1.0], [1.0, -3.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert float(accuracy_of_prediction(point(build("bernoulli"), output), y)) == 0.75


def test_predictions_and_weights_must_match():
    one = point(build("mse"), draw(6, 1))
    for predictions, log_weights in (([one], [0.0, 0.0]), ([], []), ([one, one], [-math.inf, -math.inf])):
        with pytest.raises(ValueError, match="give one for each"):
            mix(predictions, log_weights)
    with pytest.raises(ValueError, match="cannot be mixed"):
        mean_of(mix([one, point(build("mse"), draw(5, 1))], [0.0, 0.0]))


def test_a_mixture_can_be_differentiated_in_its_weights_and_outputs():
    output, y = draw(2, 3, 2), torch.randint(2, (3,))

    def loss(log_weights, outputs):
        parts = [point(build("cross_entropy"), outputs[0]), point(build("categorical"), outputs[1])]
        return loss_of(mix(parts, log_weights), y)

    assert torch.autograd.gradgradcheck(loss, (draw(2).requires_grad_(), output.requires_grad_()))
