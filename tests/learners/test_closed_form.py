"""The learners that answer in closed form, against slow oracles in float64."""

import math

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.batches import empty_like, select_samples
from online_meta.learners import _targets, constant, last_value, nearest_centroid, pooled_ridge, ridge_head
from online_meta.prediction import mean_of
from tests.learners.closed_form import (
    CLASSES,
    assert_close,
    learn,
    of_classes,
    of_loss,
    of_numbers,
    output_of,
    pooled,
)


def shares(labels, alpha):
    """Return the smoothed shares of the classes."""
    counts = [sum(label == c for label in labels) for c in range(CLASSES)]
    return torch.tensor([(n + alpha) / (sum(counts) + alpha * CLASSES) for n in counts], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["cross_entropy", "categorical"])
def test_a_constant_answers_the_smoothed_shares_of_the_support(loss):
    context, tasks = of_classes(loss)
    learner = learn(constant.build(context, alpha=0.5), tasks[:3])
    support, x = tasks[3].support, tasks[3].query.x
    for points in (1, 2, 4):
        few = select_samples(support, slice(points))
        expected = shares(few.y.tolist(), 0.5)
        assert_close(output_of(learner, few, x).exp(), expected.expand(len(x), -1), 1e-12)
    past = shares(pooled(tasks[:3]).y.tolist(), 0.5)
    assert_close(output_of(learner, empty_like(support), x).exp(), past.expand(len(x), -1), 1e-12)
    new = output_of(constant.build(context), empty_like(support), x)
    assert_close(new.exp(), torch.full((len(x), CLASSES), 1 / CLASSES).double(), 1e-12)


@pytest.mark.parametrize("loss", ["mse", "gaussian_of_noise"])
def test_a_constant_answers_the_mean_of_the_support(loss):
    context, tasks = of_numbers(loss)
    learner = learn(constant.build(context), tasks[:3])
    support, x = tasks[3].support, tasks[3].query.x
    for points in (1, 4):
        few = select_samples(support, slice(points))
        assert_close(output_of(learner, few, x), few.y.mean(0).expand(len(x), -1), 1e-12)
    past = pooled(tasks[:3]).y.mean(0)
    assert_close(output_of(learner, empty_like(support), x), past.expand(len(x), -1), 1e-12)
    assert not output_of(constant.build(context), empty_like(support), x).any()


def test_a_constant_counts_neither_padding_nor_the_ignored_class():
    context, tasks = of_classes()
    x, y = tasks[0].support.x, torch.tensor([1, -100, 3, 3])
    learner = constant.build(context)
    weight = torch.tensor([2.0, 1.0, 1.0, 0.0])
    expected = shares([1, 1, 3], 1.0).expand(4, -1)
    assert_close(output_of(learner, om.Batch(x, y, weight), x).exp(), expected, 1e-12)
    numbers, (task, *_) = of_numbers()
    y = task.support.y.clone()
    y[3] = math.nan
    expected = (2 * y[0] + y[1] + y[2]) / 4
    found = output_of(constant.build(numbers), om.Batch(x, y, weight), x)
    assert_close(found, expected.expand(4, -1), 1e-12)


def test_a_constant_has_one_distribution_for_all_pixels_and_takes_probabilities():
    model = nn.Conv2d(1, CLASSES, 1).double()
    learner = constant.build(of_loss("cross_entropy", model))
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    y = torch.tensor([[[0, 1], [1, 1]], [[2, -100], [0, 1]]])
    expected = shares([0, 1, 1, 1, 2, 0, 1], 1.0).reshape(1, -1, 1, 1).expand(2, -1, 2, 2)
    assert_close(output_of(learner, om.Batch(x, y), x).exp(), expected, 1e-12)
    rows = torch.zeros(2, 3, dtype=torch.float64)
    soft = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = output_of(constant.build(of_loss("cross_entropy")), om.Batch(rows, soft), rows)
    assert_close(found.exp()[0], torch.tensor([2.5, 1.5, 1, 1]).double() / 6, 1e-12)


@pytest.mark.parametrize("loss", ["mse", "gaussian_of_noise"])
def test_the_last_value_of_numbers_is_that_of_the_last_sample(loss):
    context, tasks = of_numbers(loss)
    learner, (support, (x, _)) = last_value.build(context), tasks[3]
    assert learner.order_matters
    assert not output_of(learner, empty_like(support), x).any()
    learn(learner, tasks[:3])
    for points in (1, 2, 4):
        found = output_of(learner, select_samples(support, slice(points)), x)
        assert_close(found, support.y[points - 1].expand(len(x), -1), 0)
    assert_close(output_of(learner, empty_like(support), x), tasks[2].query.y[-1].expand(len(x), -1), 0)


def test_the_last_value_of_classes_has_smoothed_shares():
    context, tasks = of_classes()
    learner, x = learn(last_value.build(context, alpha=0.5), tasks[:1]), tasks[1].support.x
    y, weight = torch.tensor([1, 3, -100, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = output_of(learner, om.Batch(x, y, weight), x)
    assert_close(found.exp(), torch.tensor([0.5, 0.5, 0.5, 1.5]).double().expand(4, -1) / 3, 1e-12)
    before = shares([int(tasks[0].query.y[-1])], 0.5)
    assert_close(output_of(learner, om.Batch(x, torch.full((4,), -100)), x).exp(), before.expand(4, -1), 1e-12)
    new = output_of(last_value.build(context), empty_like(tasks[1].support), x)
    assert_close(new.exp(), torch.full((4, CLASSES), 1 / CLASSES).double(), 1e-12)


def test_the_last_value_of_an_image_of_classes_is_the_last_image():
    context = of_loss("cross_entropy", nn.Conv2d(1, CLASSES, 1).double())
    y = torch.tensor([[[0, 1], [1, 1]], [[2, -100], [0, 1]]])
    batch = om.Batch(torch.zeros(2, 1, 2, 2, dtype=torch.float64), y)
    found = output_of(last_value.build(context), batch, batch.x)[0]
    assert found.argmax(0).tolist() == [[2, 0], [0, 1]]
    assert_close(found[:, 0, 1].exp(), torch.full((CLASSES,), 0.25).double(), 1e-12)


def minimise(x, y, weight, strength, centre):
    """Return argmin_W sum_i w_i |z_i W - y_i|^2 + strength |W - centre|^2 as the least squares of a longer system."""
    z = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    root = weight.sqrt()[:, None]
    left = torch.cat([root * z, math.sqrt(strength) * torch.eye(z.shape[1], dtype=x.dtype)])
    right = torch.cat([root * y, math.sqrt(strength) * centre])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution


def apply(weights, x):
    return x @ weights[:-1] + weights[-1]


@pytest.mark.parametrize("per", ["task", "pooled", "both"])
@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_ridge_regression_solves_the_least_squares(per, strength):
    context, tasks = of_numbers()
    learner = learn(ridge_head.build(context, strength=strength, per=per), tasks[:3])
    past, (support, (x, _)) = pooled(tasks[:3]), tasks[3]
    zero = torch.zeros(4, 2, dtype=torch.float64)
    start = zero if per == "task" else minimise(past.x, past.y, torch.ones(len(past.x)).double(), strength, zero)
    for points in (0, 1, 2, 3, 4):  # There are 4 columns with the constant: from fewer samples, the dual form.
        few = select_samples(support, slice(points))
        ones = torch.ones(points, dtype=torch.float64)
        right = start if per == "pooled" else minimise(few.x, few.y, ones, strength, start)
        assert_close(output_of(learner, few, x), apply(right, x), 1e-9)


@pytest.mark.parametrize("case", [of_numbers, of_classes])
def test_pooled_ridge_is_the_ridge_of_all_rounds(case):
    context, tasks = case()
    found = learn(pooled_ridge.build(context, strength=0.3, temperature=0.5), tasks[:3])
    right = learn(ridge_head.build(context, strength=0.3, per="pooled", temperature=0.5), tasks[:3])
    support, (x, _) = tasks[3]
    assert_close(output_of(found, support, x), output_of(right, support, x), 0)
    assert_close(output_of(found, empty_like(support), x), output_of(found, support, x), 0)


def test_the_sums_over_all_rounds_are_saved_but_not_published():
    context, tasks = of_numbers()
    learner = learn(pooled_ridge.build(context), tasks[:3])
    assert learner.state().keys() == {"weights"}
    assert learner.save().keys() == {"state.weights", "state.squares", "state.products"}


def test_inputs_that_depend_on_each_other_beyond_rounding_are_fitted():
    context, tasks = of_numbers()

    def stretch(batch):
        return batch._replace(x=1e9 * batch.x[:, :1].expand(-1, 3))

    stretched = [om.Task(*map(stretch, task)) for task in tasks]
    for per in ("task", "pooled", "both"):
        learner = learn(ridge_head.build(context, per=per), stretched[:3])
        assert output_of(learner, stretched[3].support, stretched[3].query.x).abs().max() < 100


@pytest.mark.parametrize("inputs", [2, 30])
def test_both_forms_of_ridge_regression_are_the_normal_equations(inputs):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(7, inputs, generator=random, dtype=torch.float64)
    targets = torch.randn(7, 3, generator=random, dtype=torch.float64)
    right = torch.linalg.inv(rows.T @ rows + 0.5 * torch.eye(inputs).double()) @ rows.T @ targets
    assert_close(ridge_head.solve_ridge(rows, targets, 0.5), right, 1e-10)


def test_ridge_regression_of_classes_fits_one_hot_targets():
    context, tasks = of_classes()
    learner = ridge_head.build(context, strength=0.5, temperature=0.25)
    x = tasks[0].support.x
    y, weight = torch.tensor([1, -100, 3, 0]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    hot = torch.eye(CLASSES, dtype=torch.float64)[[1, 3]]
    zero = torch.zeros(4, CLASSES, dtype=torch.float64)
    right = minimise(x[[0, 2]], hot, torch.tensor([2.0, 1.0]).double(), 0.5, zero)
    assert_close(output_of(learner, om.Batch(x, y, weight), x), apply(right, x) / 0.25, 1e-9)
    nothing = learner.answers({}, empty_like(tasks[0].support), x)[""]
    assert_close(mean_of(nothing), torch.full((4, CLASSES), 1 / CLASSES).double(), 1e-12)


def squared_distance(a, b):
    return sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("loss", ["cross_entropy", "categorical"])
def test_the_logits_of_the_nearest_centroid_are_squared_distances(loss):
    context, tasks = of_classes(loss)
    learner = nearest_centroid.build(context, temperature=2.0)
    support, x = tasks[0].support.x, tasks[1].query.x
    y, weight = torch.tensor([1, 3, 1, -100]), torch.tensor([2.0, 1.0, 1.0, 1.0])
    found = output_of(learner, om.Batch(support, y, weight), x)
    middle = [(2 * float(a) + float(b)) / 3 for a, b in zip(support[0], support[2], strict=True)]
    for row, one in zip(found, x, strict=True):
        near = {1: -squared_distance(one, middle) / 2, 3: -squared_distance(one, support[1]) / 2}
        right = [near.get(c, min(near.values()) - nearest_centroid.MISSING) for c in range(CLASSES)]
        assert_close(row, torch.tensor(right, dtype=torch.float64), 1e-12)
    assert not output_of(learner, empty_like(tasks[0].support), x).any()


@pytest.mark.parametrize("loss", ["mse", "gaussian_of_noise"])
def test_the_nearest_centroid_of_numbers_is_a_kernel_average(loss):
    context, tasks = of_numbers(loss)
    learner = nearest_centroid.build(context, temperature=0.5)
    (support, target), x = tasks[0].support, tasks[1].query.x
    weight = [2.0, 1.0, 0.5, 0.0]
    found = output_of(learner, om.Batch(support, target, torch.tensor(weight)), x)
    for row, one in zip(found, x, strict=True):
        near = [w * math.exp(-squared_distance(one, other) / 0.5) for w, other in zip(weight, support, strict=True)]
        right = sum(share * y for share, y in zip(near, target, strict=True)) / sum(near)
        assert_close(row, right, 1e-12)
    assert not output_of(learner, empty_like(tasks[0].support), x).any()


def test_a_dict_of_inputs_is_one_row_whatever_its_order():
    context, (task, *_) = of_numbers()

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.layer(torch.cat([x["a"], x["b"][:, None]], 1))

    whole = output_of(ridge_head.build(context), task.support, task.query.x)
    learner = ridge_head.build(of_loss("mse", Split()))
    x, own = ({"b": one[:, 2], "a": one[:, :2]} for one in (task.query.x, task.support.x))
    assert_close(output_of(learner, om.Batch(own, task.support.y), x), whole, 1e-12)


def test_sums_over_many_inputs_are_refused(monkeypatch):
    monkeypatch.setattr(_targets, "MOST_INPUTS", 2)
    context, (task, *_) = of_numbers()
    for per in ("pooled", "both"):
        with pytest.raises(ValueError, match=r"keeps the squares of 3 inputs: at most 2 .* per = 'task'"):
            ridge_head.build(context, per=per).score(task)
    ridge_head.build(context).score(task)


@pytest.mark.parametrize("learner", [nearest_centroid, ridge_head])
def test_one_class_a_row_is_needed(learner):
    learner = learner.build(of_loss("cross_entropy", nn.Conv2d(1, CLASSES, 1).double()))
    images = om.Batch(torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.zeros(2, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\): one class a row"):
        learner.score(om.Task(images, images))


@pytest.mark.parametrize("loss", ["poisson", "bernoulli", "gaussian", nn.functional.l1_loss])
@pytest.mark.parametrize("learner", [constant, last_value, nearest_centroid, ridge_head])
def test_other_outcomes_are_refused_by_the_names_of_those_that_are_answered(learner, loss):
    with pytest.raises(ValueError, match=r"cannot answer this loss: .*cross_entropy, categorical, mse, gaussian_of"):
        learner.build(of_loss(loss))
