"""ARUBA equals its equations, written with plain autograd in float64, on any number of ranks and with poison tasks."""

import math

import pytest
import torch

import online_meta as om
from online_meta.learners import aruba
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learner_problems import Unread, bytes_held, frozen, net, setup, stream, weights_of
from tests.learners import slow
from tests.learners.ranks import check_ranks_agree
from tests.learners.test_poison import poison

EPS, ZETA, P, BETA, ROUNDS = 0.09, 1.5, 0.8, 0.3, 5

STEPS = 5
"""More than 2: while gradients hardly turn, (phi - theta)^2 / 2 is eta^2 K^2 g^2 / 2, and rates would not change."""


def inner(module=None, fast=("*",)):
    return om.Inner(om.model_loss(module or net(), "mse"), om.rules.adam(lr=0.1), STEPS, fast)


def build(**changes):
    engine = lambda meta: om.MetaOptimizer(meta, "sgd", BETA)  # noqa: E731
    context = setup(**{"inner": inner(), "engine": engine, **changes})
    return aruba.build(context, eps=EPS, zeta=ZETA, p=P)


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


def descend(weights, rates, batch):
    """Descend with a rate per entry; return the final weights and the sum of squared gradients."""
    squares = {name: torch.zeros_like(value) for name, value in weights.items()}
    for _ in range(STEPS):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        slow.loss_of(net(), leaves, batch).backward()
        squares = {name: total + leaves[name].grad ** 2 for name, total in squares.items()}
        weights = {name: value - rates[name] * leaves[name].grad for name, value in weights.items()}
    return weights, squares


def root(over, under):
    return {name: torch.sqrt(over[name] / under[name]) for name in over}


def reference(tasks, *, half=0.5, fades=True, all_squares=True):
    """Return phi, b, g before each round and after the last, and each task's loss after adaptation."""
    phi, expected_rounds = weights_of(net()), []
    b = {name: torch.full_like(value, EPS**2) for name, value in phi.items()}
    g = {name: torch.full_like(value, ZETA**2) for name, value in phi.items()}
    for t, task in enumerate(tasks, start=1):
        answer, _ = descend(phi, root(b, g), task.support)
        expected_rounds.append((phi, b, g, float(slow.loss_of(net(), answer, task.query))))
        theta, squares = descend(phi, root(b, g), slow.joined(task))
        share = 1 / (t + 1) ** P if fades else 1.0
        for name in phi:
            b = {**b, name: b[name] + EPS**2 * share + half * (phi[name] - theta[name]) ** 2}
            g = {**g, name: g[name] + ZETA**2 * share + (squares[name] if all_squares else squares[name] / STEPS)}
        phi = {name: (1 - BETA) * phi[name] + BETA * theta[name] for name in phi}
    return [*expected_rounds, (phi, b, g, None)]


def state_of(learner):
    saved = learner.save()
    return [
        {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
        for start in ("weights.", "moved.", "squares.")
    ]


def test_each_round_follows_the_equations():
    tasks, learner = stream(ROUNDS), build()
    expected_rounds = reference(tasks)
    for task, (*right, loss) in zip(tasks, expected_rounds, strict=False):
        for found, expected in zip(state_of(learner), right, strict=True):
            assert_close(found, expected, 1e-12)
        assert_close(learner.meta().rule, root(right[1], right[2]), 1e-12)
        assert learner.score(task).loss_after == pytest.approx(loss, rel=1e-12)
        assert len(learner.learn(task).steps) == 1
    for found, expected in zip(state_of(learner), expected_rounds[-1][:3], strict=True):
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("wrong", [{"half": 1.0}, {"fades": False}, {"all_squares": False}])
def test_the_check_distinguishes_other_algorithms(wrong):
    tasks, learner = stream(ROUNDS), build()
    play(learner, tasks)
    phi, b, g, _ = reference(tasks, **wrong)[-1]
    assert relative_error(state_of(learner)[0], phi) > 1e-3
    assert relative_error(learner.meta().rule, root(b, g)) > 1e-2


def test_rates_change_only_where_weights_move():
    """One input is always 0: its weights never move and their rates keep their initial value."""
    learner, (task,) = build(), stream(1)
    still = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    blind = om.Task(*(batch._replace(x=batch.x * still) for batch in task))
    play(learner, [blind] * 8)
    rates = learner.meta().rule["0.weight"]
    assert torch.allclose(rates[:, 2], torch.full((4,), EPS / ZETA, dtype=torch.float64), rtol=1e-12)
    assert not torch.isclose(rates[:, :2], rates[0, 2], rtol=1e-3).any()


def test_weights_that_do_not_adapt_have_no_rate_and_stay():
    head = inner(fast=("2.*",))
    learner = build(inner=head, start=head.init(weights_of(net())))
    play(learner, stream(3))
    assert set(learner.meta().rule) == {"2.weight", "2.bias"}
    found, start = learner.engine.meta().weights, weights_of(net())
    assert [name for name in start if torch.equal(found[name], start[name])] == ["0.weight", "0.bias"]


def test_running_sums_are_held_in_double_precision():
    module = net().float()
    single = inner(module)
    learner = build(inner=single, start=single.init(weights_of(module)))
    task = om.Task(*(om.Batch(*(tensor.float() for tensor in batch)) for batch in stream(1)[0]))
    play(learner, [task])
    assert {value.dtype for part in state_of(learner)[1:] for value in part.values()} == {torch.float64}
    assert {value.dtype for value in learner.meta().rule.values()} == {torch.float32}


def test_its_state_has_constant_size_and_no_past_task_is_read():
    assert len(set(bytes_held(build(buffer=Unread())))) == 1


def test_a_task_that_is_not_finite_changes_only_the_round_count():
    for task in (poison("support"), poison("query")):
        learner, later = build(), build()
        ((_, learned),) = play(learner, [task])
        assert [step.skipped for step in learned.steps] == ["not_finite"]
        assert frozen(learner.save()) == frozen(later.save())
        later.load(learner.save(), 1)
        assert play(learner, stream(2)) == play(later, stream(2))
        assert frozen(learner.save()) == frozen(later.save())


def test_a_sum_that_would_overflow_is_left_unchanged():
    """Here the loss and the path are finite, and the squares of the gradients are not."""
    steep = om.Inner(om.model_loss(net(), lambda output, y: 1e200 * output.sin().mean()), om.rules.sgd(), 1)
    learner = aruba.build(setup(inner=steep), eps=1e-120)
    before = frozen(learner.save())
    ((score, learned),) = play(learner, stream(1))
    assert math.isfinite(score.loss_after)
    assert [step.skipped for step in learned.steps] == ["not_finite"]
    assert frozen(learner.save()) == before


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"zeta": -1.0}, {"p": float("nan")}])
def test_options_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="above 0"):
        aruba.build(setup(), **wrong)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(world, in_order):
    tasks = [*stream(3), poison(), *stream(2, seed=1)]
    check_ranks_agree(world, in_order, build, tasks, BETA)
