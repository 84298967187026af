"""Softmax regression and the learners that fit it, against scikit-learn and against derivatives by autograd."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import online_meta as om
import online_meta.learners
from online_meta import registry
from online_meta.batches import concat_support_query, empty_like, select_samples
from online_meta.functional.softmax_regression import curvature_of, fit_softmax_regression
from online_meta.learners import TaskShape, can_answer, logistic_head, pooled_logistic
from online_meta.testing.learner_problems import task
from tests.learners.closed_form import CLASSES, assert_close, learn, of_classes, of_loss, output_of, pooled


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def random_rows(n, d, classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=random, dtype=torch.float64)
    return rows, torch.randint(classes, (n,), generator=random), torch.rand(n, generator=random, dtype=torch.float64)


def gradient_of(objective, at):
    at = at.detach().requires_grad_()
    return torch.autograd.grad(objective(at), at)[0]


@pytest.mark.parametrize(("n", "d", "classes"), [(40, 3, 3), (6, 30, 4), (5, 2, 5), (12, 4, 2)])
@pytest.mark.parametrize("strength", [0.01, 2.0])
def test_the_fit_is_that_of_scikit_learn(n, d, classes, strength):
    rows, y, weight = random_rows(n, d, classes)
    y[:classes] = torch.arange(classes)
    found = fit_softmax_regression(rows, F.one_hot(y, classes).double(), weight, strength=strength)
    # Of two classes, scikit-learn has one vector of coefficients, which is the difference of ours.
    inverse = (2 if classes == 2 else 1) / strength
    other = LogisticRegression(C=inverse, fit_intercept=False, tol=1e-12, max_iter=10_000)
    right = torch.from_numpy(other.fit(rows.numpy(), y.numpy(), weight.numpy()).coef_).T
    if classes == 2:
        found, right = found[:, 1:] - found[:, :1], right
    assert_close(found, right, 1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_the_derivative_of_the_fit_vanishes(scale):
    rows, _, weight = random_rows(9, 5, 3)
    random = torch.Generator().manual_seed(1)
    soft, offset = torch.randn(2, 9, 3, generator=random, dtype=torch.float64)
    soft = soft.softmax(1)

    def objective(weights):
        losses = F.cross_entropy(scale * rows @ weights + offset, soft, reduction="none")
        return (weight * losses).sum() + 0.3 / 2 * weights.square().sum()

    found = fit_softmax_regression(scale * rows, soft, weight, offset, 0.3)
    assert gradient_of(objective, found).abs().max() < 1e-7 * scale


def test_a_fit_without_rows_is_zero():
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    assert not fit_softmax_regression(nothing, nothing, torch.zeros(0, dtype=torch.float64)).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_rows_that_are_not_finite_have_no_fit_and_change_no_model(value):
    rows, y, weight = random_rows(5, 3, 2)
    rows[2, 1] = value
    assert fit_softmax_regression(rows, F.one_hot(y, 2).double(), weight).isnan().all()
    context, tasks = of_classes()
    learner = learn(pooled_logistic.build(context), tasks[:2])
    before, (x, labels) = learner.state(), tasks[2].support[:2]
    poisoned = tasks[2]._replace(support=om.Batch(x.where(x != x[0, 0], value), labels))
    learner.score(poisoned)
    assert [step.skipped for step in learner.learn(poisoned).steps] == ["not_finite"]
    assert learner.state() is not before
    assert_close(learner.state()["weights"], before["weights"], 0)


def test_the_curvature_has_the_trace_of_the_hessian():
    random = torch.Generator().manual_seed(2)
    for classes in (2, 3, 7):
        logits = torch.randn(4, classes, generator=random, dtype=torch.float64)
        for p, found in zip(logits.softmax(1), curvature_of(logits.softmax(1)), strict=True):
            hessian = torch.autograd.functional.hessian(lambda row: -row.log_softmax(0)[0], p.log())
            centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
            assert_close(found * centred.trace(), hessian.trace(), 1e-12)
            if classes == 2:
                assert_close(found * centred, hessian, 1e-12)


def stationary(batch, found, centre, strength):
    """Return the derivative at ``found`` of the penalised loss of the samples of a batch."""

    def objective(weights):
        loss = F.cross_entropy(with_ones(batch.x) @ weights, batch.y, reduction="sum")
        return loss + strength / 2 * (weights - centre).square().sum()

    return gradient_of(objective, found).abs().max()


def weights_of_answer(learner, support):
    """Return the weights (4, classes) by which a learner answers to inputs of 3 numbers."""
    x = torch.cat([torch.eye(3), torch.zeros(1, 3)]).double()
    logits = output_of(learner, support, x)
    return torch.cat([logits[:3] - logits[3], logits[3:]])


@pytest.mark.parametrize("loss", ["cross_entropy", "categorical"])
@pytest.mark.parametrize("per", ["task", "pooled", "both"])
def test_logistic_regression_minimises_the_penalised_loss(per, loss):
    context, tasks = of_classes(loss)
    learner = learn(logistic_head.build(context, strength=0.7, per=per), tasks[:1])
    zero = torch.zeros(4, CLASSES, dtype=torch.float64)
    past = weights_of_answer(learner, empty_like(tasks[1].support))
    if per == "task":
        assert_close(past, zero, 0)
    else:  # One round is fitted exactly.
        assert stationary(concat_support_query(tasks[0]), past, zero, 0.7) < 1e-6
    for points in (1, 2, 4):
        few = select_samples(tasks[1].support, slice(points))
        found = weights_of_answer(learner, few)
        if per == "pooled":
            assert_close(found, past, 0)
        else:
            assert stationary(few, found, past, 0.7) < 1e-6


def test_logistic_regression_counts_neither_padding_nor_the_ignored_class():
    context, tasks = of_classes()
    learner, x = logistic_head.build(context), tasks[0].support.x
    y, weight = torch.tensor([1, -100, 3, 0]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    found = output_of(learner, om.Batch(x, y, weight), x)
    right = output_of(learner, om.Batch(x[[0, 0, 2]], torch.tensor([1, 1, 3])), x)
    assert_close(found, right, 1e-7)


def of_two_classes():
    """Return a run of two classes, and a function that makes batches of one logistic model of three inputs."""
    true = torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)

    def batch(n, seed):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 3, generator=random, dtype=torch.float64)
        chance = (with_ones(x) @ true).sigmoid()
        return om.Batch(x, (torch.rand(n, generator=random, dtype=torch.float64) < chance).long())

    return of_loss("cross_entropy", nn.Linear(3, 2).double()), batch


def test_the_model_of_all_rounds_steps_by_the_hessians_of_the_past():
    context, batch = of_two_classes()
    learner = pooled_logistic.build(context, strength=0.5)
    weights, hessian = torch.zeros(4, 2, dtype=torch.float64), 0.5 * torch.eye(8, dtype=torch.float64)
    for round in range(4):
        one = om.Task(batch(5, 2 * round), batch(4, 2 * round + 1))
        learn(learner, [one])
        found, both = weights_of_answer(learner, one.support), concat_support_query(one)

        def loss(flat, both=both):
            return F.cross_entropy(with_ones(both.x) @ flat.reshape(4, 2), both.y, reduction="sum")

        def objective(flat, before=weights, hessian=hessian, loss=loss):
            return loss(flat) + (flat - before.flatten()) @ hessian @ (flat - before.flatten()) / 2

        assert gradient_of(objective, found.flatten()).abs().max() < 1e-6
        weights, hessian = found, hessian + torch.autograd.functional.hessian(loss, found.flatten())


def test_the_model_of_all_rounds_comes_close_to_the_fit_of_all_samples():
    context, batch = of_two_classes()
    tasks = [om.Task(batch(5, 2 * round), batch(5, 2 * round + 1)) for round in range(200)]
    learner, past, test = learn(pooled_logistic.build(context), tasks), pooled(tasks), batch(4000, 5000)
    hot = F.one_hot(past.y, 2).double()
    best = fit_softmax_regression(with_ones(past.x), hot, torch.ones(len(hot)).double())
    found, right = (
        F.cross_entropy(logits, test.y)
        for logits in (output_of(learner, tasks[0].support, test.x), with_ones(test.x) @ best)
    )
    assert abs(found - right) < 5e-4
    assert right < 0.5 * math.log(2) + 0.2


def test_one_matrix_of_the_inputs_is_factorised_a_round(monkeypatch):
    context, tasks = of_classes()
    factorise, sizes = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (sizes.append(len(matrix)), factorise(matrix))[1])
    learn(pooled_logistic.build(context), tasks[:3])
    assert sizes == [4, 4] * 3, "with its raised diagonal, too, for a small matrix branches on no value"


def test_the_precision_is_saved_but_not_published():
    context, tasks = of_classes()
    learner = learn(pooled_logistic.build(context), tasks[:2])
    assert learner.state().keys() == {"weights"}
    assert learner.save().keys() == {"state.weights", "state.precision"}


@pytest.mark.parametrize("loss", ["mse", "gaussian_of_noise", "bernoulli"])
@pytest.mark.parametrize("learner", [logistic_head, pooled_logistic])
def test_numbers_are_refused(learner, loss):
    with pytest.raises(ValueError, match="cannot answer this loss: it answers cross_entropy, categorical, made with"):
        learner.build(of_loss(loss))


IMAGES = TaskShape("cross_entropy", (1, 28, 28))
NUMBERS = TaskShape("mse", (3,), "float64", (2,))
PER_TASK, POOLED = {"ridge_head", "logistic_head", "nearest_centroid"}, {"pooled_ridge", "pooled_logistic"}
LOGISTIC = {"logistic_head", "pooled_logistic"}
EVERY = {"constant", *PER_TASK, *POOLED}
CASES = {
    "images": (IMAGES, EVERY),
    "bytes": (IMAGES._replace(x_dtype="uint8"), EVERY),
    "numbers": (NUMBERS, EVERY - LOGISTIC),
    "numbers with noise": (NUMBERS._replace(loss="gaussian_of_noise"), EVERY - LOGISTIC),
    "scalars": (TaskShape("mse", ()), EVERY - LOGISTIC),
    "tokens": (TaskShape("cross_entropy", (8,), "int64"), {"constant"}),
    "tokens of any length": (TaskShape("cross_entropy", (-1,), "int64"), {"constant"}),
    "sequences of any length": (TaskShape("cross_entropy", (-1, 2)), {"constant", *PER_TASK}),
    "large images": (TaskShape("cross_entropy", (3, 84, 84)), {"constant", *PER_TASK}),
    "huge images": (TaskShape("cross_entropy", (3, 224, 224)), {"constant"}),
    "images of classes": (TaskShape("cross_entropy", (1, 8, 8), "float32", (8, 8)), {"constant"}),
    "counts": (TaskShape("poisson", (3,), "float32", (1,)), set()),
    "a loss of one's own": (TaskShape("my_module:loss", (3,), "float32", (1,)), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_learner_says_which_tasks_it_can_answer(case):
    tasks, right = CASES[case]
    assert {kind for kind in EVERY if can_answer(kind, tasks)} == right
    assert can_answer("ftml", tasks)


def test_an_unknown_learner_has_no_answer():
    with pytest.raises(ValueError, match="did you mean 'ridge_head'"):
        can_answer("ridge_hed", IMAGES)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_what_can_be_answered_is_answered(kind):
    """For example, sequences of other lengths in every task."""
    model = nn.Sequential(nn.AdaptiveAvgPool1d(CLASSES), nn.Linear(CLASSES, CLASSES))
    learner = registry.load(online_meta.learners, kind)(of_loss("cross_entropy", model))
    if not can_answer(kind, TaskShape("cross_entropy", (-1,))):
        return
    for round, length in enumerate((5, 9, 2)):
        one = task(round)
        sequences = om.Task(*(om.Batch(batch.x[:, :1].expand(-1, length).float(), batch.y.argmax(1)) for batch in one))
        learn(learner, [sequences])
