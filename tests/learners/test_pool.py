"""The pool against slow oracles in float64: what it mixes, how it is weighted, and what its bound says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.aggregation import tracking
from online_meta.aggregation._clipping import Clipping, clip_running
from online_meta.batches import count_samples
from online_meta.learners import PredictingLearner
from online_meta.learners.pool import OwningPool, Pool, choose_aggregation, find_mixing, select_state
from online_meta.outcomes import outcome_of
from online_meta.prediction import point, probabilities_of
from online_meta.regret.scoring import OrderError
from online_meta.testing.learner_problems import stream

CLASSES = 3


def expert(outcome, function, order_matters=False):
    """Return a learner that answers by a function of the support set and x, and learns nothing."""
    return PredictingLearner(
        {"none": torch.zeros(1)},
        lambda state, support, x: point(outcome, function(support, x)),
        order_matters=order_matters,
    )


def of_classes():
    loss = om.model_loss(nn.Linear(3, CLASSES).double(), "cross_entropy")
    tasks = [om.Task(*(b._replace(y=b.y[:, 0].gt(0).long() + b.y[:, 1].gt(0).long()) for b in t)) for t in stream(9)]
    return loss, tasks


def of_numbers():
    return om.model_loss(nn.Linear(3, 2).double(), "mse"), stream(9)


def logits(seed, scale=1.0):
    matrix = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return lambda support, x: x @ matrix


def pool_of(loss, functions, aggregation="auto", **options):
    mixing = find_mixing(loss)
    experts = {f"expert{i}": expert(loss.answer_outcome, one) for i, one in enumerate(functions)}
    return OwningPool(experts, choose_aggregation(mixing, aggregation, options), mixing, seed=3)


def play(pool, tasks):
    """Return the pool's losses and its figures, round by round."""
    losses, figures = [], []
    for task in tasks:
        losses.append(pool.score(task).loss_after)
        pool.learn(task)
        figures += pool.figures
    return losses, figures


def test_classes_are_mixed_by_bayes_rule_on_the_losses_of_earlier_rounds():
    loss, tasks = of_classes()
    functions = [logits(seed, scale) for seed, scale in ((1, 1.0), (2, 3.0), (3, 0.1))]
    losses, figures = play(pool_of(loss, functions), tasks)
    cumulative, total = np.zeros(3), 0.0
    for t, (x, y) in enumerate(task.query for task in tasks):
        weights = np.exp(-cumulative) / np.exp(-cumulative).sum()
        probabilities = np.stack([torch.softmax(one(None, x), 1).numpy() for one in functions])
        rows = np.arange(len(y)), y.numpy()
        mixed = np.einsum("k,knc->nc", weights, probabilities)
        assert losses[t] == pytest.approx(-np.log(mixed[rows]).mean(), abs=1e-12)
        assert list(figures[t].weights.values()) == pytest.approx(weights, abs=1e-12)
        cumulative += [-np.log(one[rows]).mean() for one in probabilities]
        total += losses[t]
        assert figures[t].regret == pytest.approx(total - cumulative.min(), abs=1e-12)
        assert figures[t].unclipped_regret == pytest.approx(total - cumulative.min(), abs=1e-12)
        assert figures[t].bound == pytest.approx(math.log(3), abs=1e-15)
        assert figures[t].regret <= figures[t].bound


def test_outputs_of_squared_loss_are_averaged_and_weighted_by_tracking():
    loss, tasks = of_numbers()
    functions = [lambda s, x: 0 * x[:, :2], lambda s, x: s.y.mean(0).expand(len(x), 2), lambda s, x: x[:, :2] * 3]
    losses, figures = play(pool_of(loss, functions), tasks)
    aggregation = clip_running(tracking.build(), Clipping())
    state, total, cumulative = aggregation.init(3), 0.0, np.zeros(3)
    for t, task in enumerate(tasks):
        outputs = [one(task.support, task.query.x) for one in functions]
        weights = aggregation.weights(state)
        mixed = sum(float(w) * one for w, one in zip(weights, outputs, strict=True))
        assert losses[t] == pytest.approx(float((mixed - task.query.y).square().mean()), rel=1e-12)
        assert list(figures[t].weights.values()) == pytest.approx(weights.tolist(), abs=1e-12)
        own = torch.stack([(one - task.query.y).square().mean() for one in outputs])
        state = aggregation.update(state, own, losses[t])
        total, cumulative = total + losses[t], cumulative + own.numpy()
        assert figures[t].unclipped_regret == pytest.approx(total - cumulative.min(), rel=1e-12)
        assert figures[t].regret <= figures[t].bound


@pytest.mark.parametrize("make", [of_classes, of_numbers])
def test_an_expert_that_is_not_finite_is_left_out_and_charged(make):
    loss, tasks = make()
    width = CLASSES if make is of_classes else 2

    def good(support, x):
        return x[:, :1].expand(len(x), width)

    def fails(support, x):
        return x[:, :1].expand(len(x), width) * math.nan

    pool = pool_of(loss, [good, fails])
    alone = pool_of(loss, [good])
    losses, figures = play(pool, tasks)
    assert losses == pytest.approx(play(alone, tasks)[0], rel=1e-12)
    assert figures[1].weights["expert1"] < 0.3
    assert figures[-1].weights["expert1"] < 1e-3
    assert all(one.regret <= one.bound for one in figures)


@pytest.mark.parametrize("size", [1e5, 1e20])
@pytest.mark.parametrize("begins", [0, 5])
def test_an_expert_that_diverges_does_not_spoil_the_mean(begins, size):
    loss, tasks = of_numbers()
    at = iter(range(10**6))

    def diverges(support, x):
        return x[:, :2] * (size if next(at) // 2 >= begins else 0.0)  # It answers twice a round.

    losses, figures = play(pool_of(loss, [lambda s, x: x[:, :2] * 0, lambda s, x: x[:, :2], diverges]), tasks)
    usual = play(pool_of(loss, [lambda s, x: x[:, :2] * 0, lambda s, x: x[:, :2]]), tasks)[0]
    assert max(losses) <= 4 * max(usual)
    assert all(one.regret <= one.bound for one in figures)


def test_an_answer_that_is_much_larger_than_the_targets_counts_where_others_are_as_large():
    loss, tasks = of_numbers()
    pool = pool_of(loss, [lambda s, x: x[:, :2] * 0 + 1e5, lambda s, x: x[:, :2] * 0 + 3e5])
    answer = pool.answers(pool.state(), tasks[0].support, tasks[0].query.x)[""]
    assert float(answer[0].outputs.mean()) == pytest.approx(2e5)


def test_without_any_finite_answer_the_loss_is_not_finite():
    loss, tasks = of_numbers()
    pool = pool_of(loss, [lambda s, x: x[:, :2] * math.nan, lambda s, x: x[:, :2] * math.inf])
    assert not math.isfinite(pool.score(tasks[0]).loss_after)


def test_a_loss_that_cannot_be_mixed_draws_an_expert_by_key_with_its_weight():
    loss = om.model_loss(nn.Linear(3, 2).double(), lambda output, y: (output - y).abs().max())
    assert find_mixing(loss) == "draw"
    pool = pool_of(loss, [lambda s, x: x[:, :2] * 0 + 1, lambda s, x: x[:, :2] * 0 + 2])
    tasks = stream(400)
    for task in tasks[:3]:
        pool.score(task)
        pool.learn(task)
    state, weights = pool.state(), pool.weights()
    assert 0.05 < weights["expert0"] < 0.95
    drawn = []
    for task in tasks:
        found = pool.answers(state, task.support, task.query.x)[""]
        again = pool.answers(state, task.support, task.query.x)[""]
        value = found[0].outputs.flatten()[0].item()
        assert value == again[0].outputs.flatten()[0].item()
        drawn.append(value)
    share = drawn.count(1.0) / len(drawn)
    assert share == pytest.approx(weights["expert0"], abs=4 * math.sqrt(0.25 / len(drawn)))
    assert drawn.count(1.0) + drawn.count(2.0) == len(drawn)


def test_what_is_scored_is_what_is_served_from_the_published_state():
    loss, tasks = of_classes()
    pool = pool_of(loss, [logits(1), logits(2)])
    play(pool, tasks[:4])
    state, task = pool.state(), tasks[5]
    served = probabilities_of(pool.answers(state, task.support, task.query.x)[""])
    rows = torch.arange(count_samples(task.query))
    assert pool.score(task).loss_after == pytest.approx(float(-served[rows, task.query.y].log().mean()), rel=1e-12)
    assert select_state(state, "expert0").keys() == {"none"}


def test_rounds_of_one_update_have_the_weights_from_before_it():
    loss, tasks = of_classes()
    pool = pool_of(loss, [logits(1), logits(2)])
    for task in tasks[:3]:
        pool.score(task)
    pool.learn(*tasks[:3])
    assert [one.weights for one in pool.figures] == [{"expert0": 0.5, "expert1": 0.5}] * 3
    one_by_one = pool_of(loss, [logits(1), logits(2)])
    play(one_by_one, tasks[:3])
    assert pool.weights() == pytest.approx(one_by_one.weights(), abs=1e-12)  # by the same losses of the experts


def test_scoring_a_task_twice_counts_it_once():
    loss, tasks = of_classes()
    pool, other = (pool_of(loss, [logits(1), logits(2)]) for _ in range(2))
    for _ in range(2):
        pool.score(tasks[0])
    pool.learn(tasks[0])
    play(other, tasks[:1])
    assert pool.weights() == other.weights()


def test_the_losses_of_a_scored_task_have_to_be_noted():
    loss, tasks = of_classes()
    pool = Pool({"one": expert(loss.answer_outcome, logits(1))}, choose_aggregation("density"), "density")
    pool.score(tasks[0])
    with pytest.raises(OrderError, match="0 of 1 scored tasks"):
        pool.learn(tasks[0])


def test_an_expert_that_stops_answering_keeps_its_place_and_has_no_weight():
    loss, tasks = of_classes()
    experts = {f"expert{i}": expert(loss.answer_outcome, logits(i)) for i in range(3)}
    pool = Pool(experts, choose_aggregation("density"), "density")

    def round_of(task, names):
        answered = {name: experts[name].answer_task(task) for name in names}
        mixed = pool.mix_answers(task, answered)
        pool.observe(dict.fromkeys(names, 1.0) | {"expert0": 0.5}, 0.7)
        pool.learn(task)
        return mixed

    round_of(tasks[0], experts)
    before = pool.weights()
    found = round_of(tasks[1], ["expert0", "expert2"]).whole[""]
    left = {name: before[name] / (before["expert0"] + before["expert2"]) for name in ("expert0", "expert2")}
    x = tasks[1].query.x
    right = sum(w * torch.softmax(logits(int(name[-1]))(None, x), 1) for name, w in left.items())
    torch.testing.assert_close(probabilities_of(found), right)
    known = before["expert0"] * 0.5 + before["expert2"] * 1.0
    usual = known / (before["expert0"] + before["expert2"])
    after = np.array([w * math.exp(-one) for w, one in zip(before.values(), (0.5, usual, 1.0), strict=True)])
    assert list(pool.weights().values()) == pytest.approx(after / after.sum())


def test_wrong_choices_are_refused_with_what_would_be_right():
    with pytest.raises(ValueError, match="choose adahedge"):
        choose_aggregation("mean", "fixed_share")
    with pytest.raises(ValueError, match="exp_concave is for the squared loss"):
        choose_aggregation("density", "exp_concave", {"low": 0, "high": 1})
    with pytest.raises(ValueError, match="do not fit the aggregation 'bayes'"):
        choose_aggregation("density", "bayes", {"rate": 1})
    with pytest.raises(ValueError, match="at least one expert"):
        Pool({}, choose_aggregation("density"), "density")


def test_a_loss_of_rows_of_ones_own_is_drawn_as_it_may_be_no_density():
    assert find_mixing(om.model_loss(nn.Linear(3, 2), lambda output, y: (output - y).square().sum(1))) == "draw"
    assert find_mixing(lambda params, batch: batch.x.sum()) == "draw"
    assert outcome_of(nn.functional.mse_loss).pool is not None
