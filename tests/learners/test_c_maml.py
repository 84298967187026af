"""Continual-MAML equals its equations, written with plain autograd in float64, on ranks and with poison tasks."""

import math

import pytest
import torch

import online_meta as om
from online_meta.learners import c_maml
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learner_problems import LR, STEPS, Unread, bytes_held, frozen, net, setup, stream, weights_of
from tests.learners import slow
from tests.learners.ranks import check_ranks_agree
from tests.learners.test_poison import poison

GAMMA, LEVEL, POWER, META_LR = 0.5, 4.0, 1.5, 0.1


def context(**changes):
    return setup(**{"engine": lambda meta: om.MetaOptimizer(meta, "sgd", META_LR), **changes})


def build(gamma=GAMMA, level=LEVEL, power=POWER, **changes):
    return c_maml.build(context(**changes), gamma=gamma, level=level, power=power)


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


def recurring():
    """Return tasks with repetitions: some at once, with the same map and other points, and one later."""
    first, second, third = stream(3)

    def again(task):
        return om.Task(om.Batch(*(t.flip(0)[:3] for t in slow.joined(task))), task.support)

    return [first, again(first), first, second, again(second), first, third]


def leaves(weights):
    return {name: value.clone().requires_grad_() for name, value in weights.items()}


def moved(weights, batch):
    return {name: value.detach() for name, value in slow.adapt(net(), leaves(weights), batch, LR, STEPS).items()}


def lost(weights, batch):
    return float(slow.loss_of(net(), weights, batch))


def reference(tasks, *, carries=True, modulates=True, slow_first=True, gamma=GAMMA):
    """Return each round's results, and w and theta after it; the arguments make a wrong algorithm."""
    w = weights_of(net())
    theta, expected_rounds = w, []
    for task in tasks:
        new = moved(w, task.support)
        same = lost(theta, task.support) - lost(new, task.support) < gamma
        answer = moved(theta, task.support) if same else new
        before, after = lost(theta, task.query), lost(answer, task.query)
        held = leaves(w)
        objective = slow.loss_of(net(), slow.adapt(net(), held, task.support, LR, STEPS), task.query)
        objective.backward()
        query = objective.item()
        rate = META_LR * min(1.0, query / LEVEL) ** POWER if modulates else META_LR
        old, w = w, {name: (value - rate * value.grad).detach() for name, value in held.items()}
        theta = moved(theta if same and carries else w if slow_first else old, slow.joined(task))
        expected_rounds.append((same, before, after, w, theta, query))
    return expected_rounds


def state_of(learner):
    saved = learner.save()
    return [
        {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
        for start in ("weights.", "carried.")
    ]


def test_each_round_follows_the_equations():
    tasks, learner = recurring(), build()
    expected_rounds = reference(tasks)
    assert {same for same, *_ in expected_rounds} == {True, False}, "some tasks repeat and some are new"
    assert min(query for *_, query in expected_rounds) < LEVEL < max(query for *_, query in expected_rounds), (
        "some are known and some are not"
    )
    for task, (_, before, after, w, theta, _) in zip(tasks, expected_rounds, strict=True):
        score = learner.score(task)
        assert (score.loss_before, score.loss_after) == pytest.approx((before, after), rel=1e-12)
        assert len(learner.learn(task).steps) == 1
        for found, right in zip(state_of(learner), (w, theta), strict=True):
            assert_close(found, right, 1e-12)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"carries": False}, 1),
        ({"modulates": False}, 0),
        ({"slow_first": False}, 1),
        ({"gamma": -1e9}, 1),
        ({"gamma": 1e9}, 1),
    ],
)
def test_the_check_distinguishes_other_algorithms(wrong, part):
    tasks, learner = recurring(), build()
    play(learner, tasks[:5])
    assert relative_error(state_of(learner)[part], reference(tasks[:5], **wrong)[-1][3 + part]) > 1e-3


def test_a_repeated_task_scores_better_with_carried_weights():
    first, again, *_ = recurring()
    tasks = [first, again] * 4
    carrying, forgetting = build(gamma=math.inf), build(gamma=-math.inf)
    assert play(carrying, tasks)[-1][0].loss_after < 0.9 * play(forgetting, tasks)[-1][0].loss_after


def test_without_carrying_c_maml_scores_like_maml():
    learner, (task, other) = build(gamma=-math.inf, power=0.0), stream(2)
    play(learner, [task])
    adapted = moved(learner.engine.meta().weights, other.support)
    assert learner.score(other).loss_after == pytest.approx(lost(adapted, other.query), rel=1e-12)


def test_the_query_set_does_not_influence_where_adaptation_starts():
    task, other = recurring()[:2]
    learner = build()
    play(learner, [task])
    mixed = other._replace(query=poison("query").query)
    start = learner.engine.meta().weights if not reference([task, other])[-1][0] else state_of(learner)[1]
    swapped = mixed._replace(query=other.support)
    assert learner.score(swapped).loss_after == pytest.approx(lost(moved(start, other.support), other.support))
    assert learner.score(mixed).loss_after > 1e100


def test_weights_that_do_not_adapt_are_not_carried():
    inner = om.Inner(om.model_loss(net(), "mse"), om.rules.sgd(lr=LR), STEPS, ("2.*",))
    learner = build(inner=inner, gradient=om.exact(inner), start=inner.init(weights_of(net())))
    play(learner, recurring())
    weights, carried = state_of(learner)
    assert set(carried) == {"2.weight", "2.bias"}
    assert not torch.equal(weights["0.weight"], weights_of(net())["0.weight"]), "the slow weights still learn"


def test_its_state_has_constant_size_and_no_past_task_is_read():
    assert len(set(bytes_held(build(buffer=Unread())))) == 1


@pytest.mark.parametrize("part", ["support", "query"])
def test_a_task_that_is_not_finite_changes_nothing(part):
    good = recurring()[:4]
    poisoned, clean = build(), build()
    expected_rounds = play(poisoned, [*good[:2], poison(part), *good[2:]])
    assert [step.skipped for step in expected_rounds[2][1].steps] == ["not_finite"]
    assert [line for at, line in enumerate(expected_rounds) if at != 2] == play(clean, good)
    assert frozen(poisoned.save()) == frozen(clean.save())


def test_nothing_is_carried_if_the_meta_step_is_skipped():
    """One adaptation step on the task ends finite; its loss, and so the meta-step, is not finite."""
    inner = om.Inner(om.model_loss(net(), "mse"), om.rules.sgd(lr=LR), 1)
    learner = build(inner=inner, gradient=om.exact(inner))
    before = frozen(learner.save())
    assert all(value.isfinite().all() for value in inner.adapt(learner.engine.meta(), poison().support).values())
    ((_, learned),) = play(learner, [poison()])
    assert [step.skipped for step in learned.steps] == ["not_finite"]
    assert frozen(learner.save()) == before


def test_a_diverged_adaptation_is_not_carried():
    """The meta-step is finite; five steps on the query set, which has a huge weight, are not."""
    inner = om.Inner(om.model_loss(net(), lambda output, y: (output**2 * y.abs()).mean()), om.rules.sgd(lr=LR), 5)
    learner, (task,) = build(inner=inner, gradient=om.exact(inner)), stream(1)
    before = frozen(state_of(learner)[1])
    ((_, learned),) = play(learner, [task._replace(query=task.query._replace(y=task.query.y * 1e100))])
    assert [step.skipped for step in learned.steps] == [None]
    assert frozen(state_of(learner)[1]) == before


@pytest.mark.parametrize("wrong", [{"level": 0.0}, {"power": -1.0}, {"gamma": math.nan}])
def test_limits_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="gamma is"):
        c_maml.build(setup(), **wrong)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(world, in_order):
    tasks = [*recurring(), poison(), *stream(2, seed=1)]
    check_ranks_agree(world, in_order, build, tasks, META_LR)
