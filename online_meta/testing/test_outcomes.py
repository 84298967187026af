"""What every outcome of ``online_meta.outcomes`` keeps."""

import itertools
import math

import pytest
import torch

import online_meta.outcomes
from online_meta import registry
from online_meta.prediction import cdf_of, loss_of, mean_of, mix, nll_of, point, probabilities_of
from online_meta.types import Outcome

OUTCOMES = {name: registry.load(online_meta.outcomes, name) for name in registry.names(online_meta.outcomes)}
ROWS = 5

every_outcome = pytest.mark.parametrize("name", OUTCOMES)


def example(name, rows=ROWS):
    """Return the outcome, an output and targets."""
    return OUTCOMES[name](), *registry.load_module(online_meta.outcomes, name).example(rows)


def change(function, values):
    """Return ``values``, a tensor or a dict of them, with ``function`` applied to each."""
    return {key: function(one) for key, one in values.items()} if isinstance(values, dict) else function(values)


def take(values, rows):
    """Return some rows."""
    return change(lambda one: one[rows], values)


def leaves(values):
    """Return the tensors of a tensor or a dict."""
    return [*values.values()] if isinstance(values, dict) else [values]


def to(values, dtype):
    """Return ``values`` with floating-point tensors in another dtype."""
    return change(lambda one: one.to(dtype) if one.is_floating_point() else one, values)


def functions(outcome, y):
    """Return the outcome's functions of the output alone, by name; they give a row for each row."""
    found = {"nll": lambda output: outcome.nll(output, y), "mean": outcome.mean}
    if outcome.variance is not None:
        found["variance"] = outcome.variance
    if outcome.cdf is not None:
        found["cdf"] = lambda output: outcome.cdf(output, y)
    if outcome.probabilities is not None:
        found["probabilities"] = outcome.probabilities
    return found


def targets_with_probability(outcome, output, y):
    """Return targets (m, ...) of the first row of ``output`` that hold all probability, and the measure of each.

    Classes and labels are enumerated, and so are counts; the axis of real numbers is a fine grid.
    """
    if outcome.probabilities is not None:
        classes, entries = outcome.probabilities(output).shape[1], y[0].numel()
        every = [*itertools.product(range(classes), repeat=entries)]
        return torch.tensor(every).reshape(len(every), *y.shape[1:]).to(y.dtype), torch.ones(len(every))
    low, high = (next(edge for edge in edges(sign) if is_outside(outcome, output, y, edge)) for sign in (-1, 1))
    if not y.is_floating_point():
        grid = torch.arange(0, int(high) + 1)
        return grid.reshape(-1, *y.shape[1:]), torch.ones(len(grid))
    grid = torch.linspace(low, high, 40_001, dtype=y.dtype)
    return grid.reshape(-1, *y.shape[1:]), torch.full_like(grid, float(grid[1] - grid[0]))


def edges(sign):
    """Return numbers far and farther out."""
    return (sign * 2.0**power for power in range(20))


def is_outside(outcome, output, y, edge):
    """Return whether the first row's target is beyond ``edge`` with a probability under 1e-13."""
    share = float(outcome.cdf(take(output, slice(0, 1)), torch.full_like(y[:1], edge)))
    return min(share, 1 - share) < 1e-13


def repeat_first(output, count):
    """Return ``count`` copies of the first row of ``output``."""
    return change(lambda one: one[:1].expand(count, *one.shape[1:]), output)


def check_total(outcome, output, y):
    """Check that exp(-nll) of the first row sums, or integrates, to 1 over all targets."""
    targets, measure = targets_with_probability(outcome, output, y)
    density = (-outcome.nll(repeat_first(output, len(targets)), targets)).exp()
    assert float((density * measure).sum()) == pytest.approx(1.0, abs=1e-8)


def check_mean(outcome, output, y):
    """Check that the mean of the first row is the sum, or integral, of its targets by their probability."""
    targets, measure = targets_with_probability(outcome, output, y)
    density = (-outcome.nll(repeat_first(output, len(targets)), targets)).exp() * measure
    mean = outcome.mean(output)[0]
    if mean.shape == targets.shape[1:]:
        values = targets
    else:  # Classes: the share of each.
        values = torch.nn.functional.one_hot(targets, mean.shape[0]).movedim(-1, 1)
    expected = torch.einsum("m,m...->...", density, values.to(density.dtype))
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-7)


def check_variance(outcome, output, y):
    """Check that the variance of the first row is the mean squared distance of its targets from their mean."""
    targets, measure = targets_with_probability(outcome, output, y)
    density = (-outcome.nll(repeat_first(output, len(targets)), targets)).exp() * measure
    squares = (targets.to(density.dtype) - outcome.mean(output)[0]) ** 2
    expected = torch.einsum("m,m...->...", density, squares)
    torch.testing.assert_close(outcome.variance(output)[0], expected, rtol=0, atol=1e-6)


def check_cdf(outcome, output, y):
    """Check that the cdf of the first row is the integral of exp(-nll), of counts with half of the last one."""
    targets, measure = targets_with_probability(outcome, output, y)
    many = repeat_first(output, len(targets))
    share = outcome.cdf(many, targets).flatten()
    mass = (-outcome.nll(many, targets)).exp() * measure
    assert bool((share.diff() >= 0).all())
    assert bool(((share >= 0) & (share <= 1)).all())
    torch.testing.assert_close(share, mass.cumsum(0) - mass / 2, rtol=0, atol=1e-6)


def is_likelihood(outcome):
    """Return whether the outcome's nll is in nats."""
    return outcome.loss is None or outcome.cdf is not None or outcome.probabilities is not None


@every_outcome
def test_each_result_has_one_row_for_each_row_in_the_dtype_of_the_output(name):
    outcome, output, y = example(name)
    assert all(one.dtype == torch.float64 for one in leaves(output))
    for dtype, rows in itertools.product((torch.float32, torch.float64), (0, 1, ROWS)):
        some, targets = take(to(output, dtype), slice(0, rows)), take(to(y, dtype), slice(0, rows))
        assert outcome.nll(some, targets).shape == (rows,)
        for function in functions(outcome, targets).values():
            assert len(function(some)) == rows
            assert function(some).dtype == dtype
        if outcome.cdf is not None:
            assert outcome.cdf(some, targets).shape == targets.shape


@every_outcome
def test_float32_gives_the_same_numbers(name):
    outcome, output, y = example(name)
    low, targets = to(output, torch.float32), to(y, torch.float32)
    for part, function in functions(outcome, targets).items():
        wide = functions(outcome, y)[part](output)
        torch.testing.assert_close(function(low).double(), wide, rtol=1e-4, atol=1e-5)


@every_outcome
def test_a_row_depends_on_nothing_but_itself_and_nothing_is_written(name):
    outcome, output, y = example(name)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    before = [one.clone() for one in (*leaves(output), *leaves(y))]
    for part, function in functions(outcome, y).items():
        whole = function(output)
        torch.testing.assert_close(functions(outcome, take(y, order))[part](take(output, order)), whole[order])
        single = [functions(outcome, take(y, [i]))[part](take(output, [i])) for i in range(ROWS)]
        torch.testing.assert_close(torch.cat(single), whole)
        assert torch.equal(function(output), whole)
    assert all(map(torch.equal, before, (*leaves(output), *leaves(y))))


@every_outcome
def test_it_can_be_differentiated_twice(name):
    outcome, output, y = example(name, 3)
    keys = [*output] if isinstance(output, dict) else None
    values = [one.clone().requires_grad_() for one in leaves(output)]
    for function in functions(outcome, y).values():

        def of(*inputs, function=function):
            return function(dict(zip(keys, inputs, strict=True)) if keys else inputs[0])

        if not of(*values).requires_grad:
            continue  # It is the same for every output.
        assert torch.autograd.gradcheck(of, values)
        assert torch.autograd.gradgradcheck(of, values)


@every_outcome
def test_vmap_gives_what_a_loop_gives(name):
    outcome, output, y = example(name)
    several = change(lambda one: torch.stack([one, 0.5 * one, one + 0.1]), output)
    for function in (*functions(outcome, y).values(), lambda one: loss_of(point(outcome, one), y)):
        loop = torch.stack([function(take(several, s)) for s in range(3)])
        torch.testing.assert_close(torch.func.vmap(function)(several), loop)


@every_outcome
def test_its_probability_is_one_in_total_and_has_its_mean_and_its_cdf(name):
    outcome, output, y = example(name)
    if outcome.cdf is None and outcome.probabilities is None:
        return  # There is no way to list its targets.
    for row in range(ROWS):
        one, target = take(output, [row]), take(y, [row])
        check_total(outcome, one, target)
        check_mean(outcome, one, target)
        if outcome.variance is not None:
            check_variance(outcome, one, target)
        if outcome.cdf is not None:
            check_cdf(outcome, one, target)


@every_outcome
def test_probabilities_of_classes_sum_to_one(name):
    outcome, output, _ = example(name)
    if outcome.probabilities is not None:
        probabilities = outcome.probabilities(output)
        assert bool((probabilities >= 0).all())
        torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities.sum(1)))


@every_outcome
def test_a_single_output_has_the_loss_of_the_outcome_to_the_bit(name):
    outcome, output, y = example(name)
    for dtype in (torch.float32, torch.float64):
        some, targets = to(output, dtype), to(y, dtype)
        rows = outcome.nll(some, targets)
        loss = rows.mean() if outcome.loss is None else outcome.loss(some, targets)
        assert torch.equal(loss_of(point(outcome, some), targets), loss)
        assert torch.equal(nll_of(point(outcome, some), targets), rows)
        torch.testing.assert_close(loss, rows.mean())


@every_outcome
def test_several_outputs_are_mixed_or_pooled(name):
    outcome, output, y = example(name)
    outputs = [output, change(lambda one: 0.3 * one, output), change(lambda one: one + 0.2, output)]
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mixture = mix([point(outcome, one) for one in outputs], weights.log())
    each = torch.stack([outcome.nll(one, y) for one in outputs])
    if is_likelihood(outcome):
        expected = -(weights @ (-each).exp()).log()
    elif outcome.pool is not None:
        stacked = (
            {key: torch.stack([one[key] for one in outputs]) for key in output} if isinstance(output, dict) else None
        )
        expected = outcome.nll(outcome.pool(torch.stack(outputs) if stacked is None else stacked, weights), y)
    else:
        expected = weights @ each
    torch.testing.assert_close(nll_of(mixture, y), expected)
    torch.testing.assert_close(loss_of(mixture, y), expected.mean())
    for of_all, of_one in (
        (mean_of(mixture), outcome.mean),
        (cdf_of(mixture, y), outcome.cdf and (lambda one: outcome.cdf(one, y))),
        (probabilities_of(mixture), outcome.probabilities),
    ):
        if of_one is not None:
            torch.testing.assert_close(of_all, sum(w * of_one(one) for w, one in zip(weights, outputs, strict=True)))
        else:
            assert of_all is None


@every_outcome
def test_a_row_of_weight_zero_does_not_count(name):
    outcome, output, y = example(name)
    prediction = point(outcome, output)
    assert float(loss_of(prediction, y, torch.ones(ROWS))) == pytest.approx(float(loss_of(prediction, y)), rel=1e-12)
    weight = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    kept = [0, 0, 2, 4]
    fewer = loss_of(point(outcome, take(output, kept)), take(y, kept))
    torch.testing.assert_close(loss_of(prediction, y, weight), fewer)
    torch.testing.assert_close(loss_of(mix([prediction, prediction], [0.0, 1.0]), y, weight), fewer)


@every_outcome
def test_an_output_that_does_not_fit_is_refused_with_both_shapes(name):
    outcome, output, y = example(name)
    more = change(lambda one: torch.cat([one, one[:1]]), output)
    shapes = [str(tuple(one.shape)) for one in (*leaves(more), *leaves(y))]
    for refuse in (lambda: outcome.nll(more, y), lambda: loss_of(point(outcome, more), y)):
        with pytest.raises(ValueError, match="needs") as refused:
            refuse()
        assert all(shape in str(refused.value) for shape in shapes)
    with pytest.raises(ValueError, match="one number for each row"):
        loss_of(point(outcome, output), y, torch.ones(ROWS + 1))


@every_outcome
def test_two_calls_give_one_family(name):
    assert OUTCOMES[name]() == OUTCOMES[name]()
    with pytest.raises(TypeError):
        OUTCOMES[name](no_such_option=1)


WRONG = {
    "a normal density without its constant": ("gaussian_of_noise", lambda nll: nll - 0.5 * math.log(2 * math.pi)),
    "a Poisson probability without y!": ("poisson", lambda nll: nll - 0.5),
    "classes in bits": ("categorical", lambda nll: nll / math.log(2)),
    "labels averaged over a row": ("bernoulli", lambda nll: nll / 3),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_likelihood_is_caught(kind):
    name, spoil = WRONG[kind]
    outcome, output, y = example(name)
    wrong: Outcome = outcome._replace(nll=lambda some, targets: spoil(outcome.nll(some, targets)))
    with pytest.raises(AssertionError):
        check_total(wrong, output, y)


def test_a_cdf_a_mean_and_a_variance_of_another_distribution_are_caught():
    outcome, output, y = example("gaussian")
    with pytest.raises(AssertionError):
        check_cdf(outcome._replace(cdf=lambda some, targets: outcome.cdf(some, targets + 0.01)), output, y)
    with pytest.raises(AssertionError):
        check_mean(outcome._replace(mean=lambda some: outcome.mean(some) + 0.01), output, y)
    with pytest.raises(AssertionError):
        check_variance(outcome._replace(variance=lambda some: outcome.variance(some) + 0.01), output, y)
    outcome, output, y = example("poisson")
    with pytest.raises(AssertionError):
        check_cdf(outcome._replace(cdf=lambda some, targets: outcome.cdf(some, targets + 0.5)), output, y)


@pytest.mark.parametrize("name", [name for name in OUTCOMES if OUTCOMES[name]().root is not None])
def test_the_root_is_that_of_the_curvature(name):
    """The Fisher information by a sum over all targets; the second derivative of what is no distribution."""
    outcome, output, y = example(name, 2)
    roots = leaves(outcome.root(output, y))
    assert [one.shape[:-1] for one in roots] == [one.shape for one in leaves(output)]
    root = torch.cat([one[0].reshape(-1, one.shape[-1]) for one in roots])
    one, target = take(output, slice(0, 1)), y[:1]
    if outcome.cdf is None and outcome.probabilities is None:
        right = torch.autograd.functional.hessian(lambda given: outcome.nll(given, target).sum(), one)
        right = right.reshape(len(root), len(root))
    else:
        targets, measure = targets_with_probability(outcome, one, target)
        rows = change(lambda part: part.expand(len(targets), *part.shape[1:]).clone().requires_grad_(), one)
        nll = outcome.nll(rows, targets)
        grads = torch.cat([g.flatten(1) for g in torch.autograd.grad(nll.sum(), leaves(rows))], 1)
        right = grads.T @ ((measure * (-nll.detach()).exp())[:, None] * grads)
    torch.testing.assert_close(root @ root.T, right, rtol=1e-6, atol=1e-8)


def test_the_root_of_entries_that_do_not_count_is_zero_and_entries_are_apart():
    random = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    y = torch.randint(3, (2, 4), generator=random)
    y[0, 1] = -100
    root = OUTCOMES["categorical"]().root(output, y)
    found = torch.einsum("ncer,ndfr->ncedf", root, root)
    for row, entry in itertools.product(range(2), range(4)):
        p = output[row, :, entry].softmax(0)
        right = 0 * p.outer(p) if y[row, entry] == -100 else torch.diag(p) - p.outer(p)
        torch.testing.assert_close(found[row, :, entry, :, entry], right)
        assert not found[row, :, entry, :, [e for e in range(4) if e != entry]].any()


def test_the_root_of_a_dict_is_that_of_the_joined_tensor():
    outcome, output, y = example("gaussian")
    named = dict(zip(("mean", "scale"), output.chunk(2, -1), strict=True))
    found = outcome.root(named, y)
    torch.testing.assert_close(torch.cat([found["mean"], found["scale"]], -2), outcome.root(output, y))
