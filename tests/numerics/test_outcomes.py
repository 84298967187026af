"""The outcomes against torch's distributions and SciPy, at extreme outputs, and for rows of several dimensions."""

import importlib
import itertools

import pytest
import scipy.stats
import torch
from torch import distributions
from torch.nn import functional as F

from online_meta import outcomes, registry
from online_meta.outcomes import outcome_of

DOUBLE = torch.float64


def build(name, **options):
    return registry.load(outcomes, name)(**options)


def draw(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=DOUBLE)


def gaussian_case():
    mean, scale, y = draw(4, 3, 2), draw(4, 3, 2), draw(4, 3, 2)
    right = distributions.Normal(mean, 0.01 + (1 + scale.exp()).log())
    return build("gaussian", least=0.01), torch.cat([mean, scale], -1), y, right


def gaussian_by_name_case():
    outcome, output, y, right = gaussian_case()
    return outcome, {"mean": output[..., :2], "scale": output[..., 2:]}, y, right


def noise_case():
    output, y = draw(4, 3, 2), draw(4, 3, 2)
    return build("gaussian_of_noise", sigma=0.3), output, y, distributions.Normal(output, 0.3)


def poisson_case():
    output = draw(4, 3)
    return build("poisson"), output, torch.poisson(output.exp()), distributions.Poisson(output.exp())


def bernoulli_case():
    output = draw(4, 3, 2)
    return build("bernoulli"), output, torch.randint(2, (4, 3, 2)), distributions.Bernoulli(logits=output)


def classes_case(name):
    output = draw(4, 3, 5)
    return build(name), output, torch.randint(3, (4, 5)), distributions.Categorical(logits=output.movedim(1, -1))


def ordinal_case():
    output = draw(4, 3, 5)
    cuts = [output[:, 0]]
    for k in (1, 2):
        cuts.append(cuts[-1] + (1 + output[:, k].exp()).log())
    at_most = [
        torch.zeros(4, 5, dtype=DOUBLE),
        *(1 / (1 + (-cut).exp()) for cut in cuts),
        torch.ones(4, 5, dtype=DOUBLE),
    ]
    chances = torch.stack([after - before for before, after in itertools.pairwise(at_most)], -1)
    return build("ordinal"), output, torch.randint(4, (4, 5)), distributions.Categorical(probs=chances)


CASES = {
    "ordinal": ordinal_case,
    "gaussian": gaussian_case,
    "gaussian by name": gaussian_by_name_case,
    "gaussian_of_noise": noise_case,
    "poisson": poisson_case,
    "bernoulli": bernoulli_case,
    "categorical": lambda: classes_case("categorical"),
    "cross_entropy": lambda: classes_case("cross_entropy"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_likelihood_is_that_of_torch_distributions_summed_over_a_row(name):
    outcome, output, y, right = CASES[name]()
    expected = -right.log_prob(y.to(DOUBLE)).flatten(1).sum(1)
    torch.testing.assert_close(outcome.nll(output, y), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # of another target
        torch.testing.assert_close(outcome.nll(output, y.roll(1, 0)), expected, rtol=1e-12, atol=1e-12)
    if name in ("categorical", "cross_entropy", "ordinal"):
        torch.testing.assert_close(outcome.probabilities(output), right.probs.movedim(-1, 1))
    else:
        torch.testing.assert_close(outcome.mean(output), right.mean)


@pytest.mark.parametrize("name", ["gaussian", "gaussian by name", "gaussian_of_noise"])
def test_the_cdf_is_exact_far_in_both_tails(name):
    outcome, output, _, right = CASES[name]()
    for z in (-30.0, -8.0, -1.0, 0.0, 1.0, 8.0):
        y = right.mean + z * right.stddev
        expected = torch.full_like(y, scipy.stats.norm.cdf(z))
        torch.testing.assert_close(outcome.cdf(output, y), expected, rtol=1e-10, atol=0)


def test_the_cdf_of_counts_is_the_mid_distribution():
    outcome, output, y, right = poisson_case()
    rate = right.rate.numpy()
    expected = scipy.stats.poisson.cdf(y.numpy(), rate) - scipy.stats.poisson.pmf(y.numpy(), rate) / 2
    torch.testing.assert_close(outcome.cdf(output, y), torch.from_numpy(expected), rtol=1e-8, atol=1e-14)
    assert not outcome.cdf(output, torch.full_like(y, -1)).any()


@pytest.mark.parametrize("name", ["cross_entropy", "categorical"])
def test_ignored_classes_are_left_out_as_torch_does(name):
    outcome, output, y, _ = classes_case(name)
    flat, classes = output[:, :, 0], y[:, 0].clone()
    classes[1] = -100
    assert float(outcome.nll(flat, classes)[1]) == 0.0
    torch.testing.assert_close(outcome.loss(flat, classes), F.cross_entropy(flat, classes))
    y[0] = -100
    y[1, 2:] = -100
    expected = F.cross_entropy(output, y, reduction="none").sum(1)
    torch.testing.assert_close(outcome.nll(output, y), expected)
    loss = F.cross_entropy(output, y) if name == "cross_entropy" else expected.sum() / 3
    torch.testing.assert_close(outcome.loss(output, y), loss)
    soft = output.softmax(1).roll(1, 0)
    torch.testing.assert_close(outcome.nll(output, soft), -(soft * output.log_softmax(1)).flatten(1).sum(1))


def test_ordered_classes_that_are_ignored_are_left_out():
    outcome, output, y, right = ordinal_case()
    expected = -right.log_prob(y)
    y[0] = expected[0] = -100
    y[1, 2:] = -100
    expected[1, 2:] = expected[0] = 0
    torch.testing.assert_close(outcome.nll(output, y), expected.sum(1))
    torch.testing.assert_close(outcome.loss(output, y), expected.sum() / 3)
    with pytest.raises(ValueError, match=r"ordinal: the output has shape \(4, 3, 5\) and y \(4,\): it needs an output"):
        outcome.nll(output, y[:, 0])
    with pytest.raises(ValueError, match="classes - 1"):
        outcome.probabilities(output[:, :0])


def test_the_losses_by_name_are_those_of_torch():
    assert build("mse").loss is F.mse_loss
    assert build("cross_entropy").loss is F.cross_entropy
    assert outcome_of(F.mse_loss) is not None
    assert outcome_of(F.mse_loss) == build("mse")
    assert outcome_of(F.cross_entropy) == build("cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_outputs_give_finite_losses_and_gradients(dtype):
    large = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    cases = [
        ("categorical", large, torch.tensor([1]), 2e4),
        ("ordinal", large, torch.tensor([2]), 1e4 + 0.6931472),
        ("bernoulli", large, torch.tensor([[0.0, 1.0, 1.0]]), 2e4 + 0.6931472),
        ("gaussian", torch.tensor([[0.0, 1e4]], dtype=dtype), torch.zeros(1, 1), 9.210340 + 0.918939),
        ("gaussian", torch.tensor([[0.0, -1e4]], dtype=dtype), torch.zeros(1, 1), -6.907755 + 0.918939),
        ("poisson", torch.tensor([[-1e4, 20.0]], dtype=dtype), torch.zeros(1, 2), 4.8516520e8),
    ]
    for name, output, y, expected in cases:
        output.requires_grad_()
        found = build(name).nll(output, y.to(dtype) if y.is_floating_point() else y)
        (gradient,) = torch.autograd.grad(found.sum(), output)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-6), name
        assert bool(torch.isfinite(gradient).all()), name
    assert float(outcome_pool_of_extremes(dtype)) == pytest.approx(2e4 + 0.6931472, rel=1e-6)


def outcome_pool_of_extremes(dtype):
    outputs = torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]], dtype=dtype)
    outcome = build("cross_entropy")
    pooled = outcome.pool(outputs, torch.tensor([0.5, 0.5], dtype=dtype))
    one_of_two = outcome.pool(torch.stack([outputs[0], -outputs[0]]), torch.tensor([1.0, 0.0], dtype=dtype))
    torch.testing.assert_close(one_of_two.softmax(1), outputs[0].softmax(1))
    return outcome.nll(pooled, torch.tensor([1])) + 0.6931472


def test_the_standard_deviation_is_exact_for_every_scale():
    scale = torch.linspace(-60, 60, 241, dtype=DOUBLE)[:, None]
    zero = torch.zeros_like(scale)
    std = 1e-3 + torch.logaddexp(scale, zero)
    expected = -distributions.Normal(zero, std).log_prob(zero).sum(1)
    found = build("gaussian").nll({"mean": zero, "scale": scale}, zero)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_tasks_that_are_functions_or_environments_sum_their_output():
    values = draw(4, 3, 2)
    for y in (torch.zeros(4), {"goal": torch.zeros(4, 7)}):
        torch.testing.assert_close(build("objective").nll(values, y), values.sum((1, 2)))
        torch.testing.assert_close(build("return").nll(values, y), -values.sum((1, 2)))
    torch.testing.assert_close(build("return").loss(values[:, 0, 0], torch.zeros(4)), -values[:, 0, 0].mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gaussian_of_noise", {"sigma": 0.0}),
        ("gaussian_of_noise", {"sigma": float("nan")}),
        ("gaussian", {"least": -1.0}),
        ("gaussian", {"least": float("inf")}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match="positive and finite"):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "output", "y", "needs"),
    [
        ("gaussian", torch.zeros(4, 3), torch.zeros(4, 3), r"\(4, 3\) and y \(4, 3\): it needs .*2 d"),
        ("gaussian", torch.zeros(4, 2), torch.zeros(4), r"\(4, 2\) and y \(4,\): it needs .*2 d"),
        ("gaussian", {"mean": torch.zeros(4)}, torch.zeros(4), r"\{mean: \(4,\)\} and y \(4,\): it needs 'mean' and"),
        ("gaussian_mixture", torch.zeros(4, 4), torch.zeros(4), r"\(4, 4\): it needs .*3 K"),
        ("gaussian_mixture", torch.zeros(4, 6), torch.zeros(4, 1), r"\(4, 6\) and y \(4, 1\): it needs .*3 K"),
        ("poisson", torch.zeros(4), torch.zeros(4, 1), r"an output of the shape of y, \(4, 1\)"),
        ("mse", {"a": torch.zeros(4)}, torch.zeros(4), r"\{a: \(4,\)\} and y \(4,\)"),
        ("categorical", torch.zeros(4), torch.zeros(4).long(), r"logits \(n, classes, ...\)"),
        ("categorical", torch.zeros(4, 3), torch.zeros(4, 1).long(), r"\(4, 3\) and y \(4, 1\)"),
        ("cross_entropy", torch.zeros(4, 3), torch.zeros(4), r"or probabilities of the classes"),
        ("return", torch.zeros(3, 2), {"goal": torch.zeros(4, 2)}, r"an output of 4 rows, \(4, ...\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named_with_what_is_right(name, output, y, needs):
    with pytest.raises(ValueError, match=needs):
        build(name).nll(output, y)


def test_the_two_forms_of_a_gaussian_output_have_the_same_bits():
    outcome, output, y, _ = gaussian_case()
    named = {"mean": output[..., :2], "scale": output[..., 2:]}
    assert torch.equal(outcome.nll(output, y), outcome.nll(named, y))
    assert torch.equal(outcome.cdf(output, y), outcome.cdf(named, y))
    with pytest.raises(ValueError, match="needs 'mean' and 'scale'"):
        outcome.mean({"mean": y})


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_the_two_forms_of_the_output_of_a_mixture_have_the_same_bits(shape):
    outcome, output, y = build("gaussian_mixture"), draw(*shape, 15), draw(*shape)
    named = {"mean": output[..., :5], "scale": output[..., 5:10], "logit": output[..., 10:]}
    for function in (outcome.nll, outcome.cdf):
        assert torch.equal(function(output, y), function(named, y))
    for function in (outcome.mean, outcome.variance):
        assert torch.equal(function(output), function(named))


def test_an_outcome_may_be_called_like_a_keyword():
    assert importlib.import_module("online_meta.outcomes.return").build() == build("return")
