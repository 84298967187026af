"""MOML equals its equations, written with plain autograd in float64, on any number of ranks and with poison tasks."""

import pytest
import torch

import online_meta as om
from online_meta.learners import moml
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learner_problems import LR, STEPS, Unread, bytes_held, frozen, net, setup, stream, weights_of
from tests.learners import slow
from tests.learners.ranks import check_ranks_agree
from tests.learners.test_poison import poison

ALPHA, META_LR, META_STEPS, ROUNDS = 0.7, 0.1, 4, 5


def context(**changes):
    return setup(**{"engine": lambda meta: om.MetaOptimizer(meta, "sgd", META_LR), **changes})


def build(**changes):
    return moml.build(context(**changes), alpha=ALPHA, steps=META_STEPS)


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


def flat(weights):
    return torch.cat([value.reshape(-1) for value in weights.values()])


def shaped(vector, like):
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def reference(tasks, *, keeps_dual=True, half=0.5, penalty=1.0):
    """Return w, lambda and omega after each round, as vectors; the arguments make a wrong algorithm."""
    module = net()
    like = weights_of(module)
    w, expected_rounds = flat(like), []
    dual, mean = torch.zeros_like(w), w.clone()
    for task in tasks:
        for _ in range(META_STEPS):
            leaf = w.clone().requires_grad_()
            adapted = slow.adapt(module, shaped(leaf, like), task.support, LR, STEPS)
            away = leaf - mean
            objective = slow.loss_of(module, adapted, task.query) - dual @ leaf + penalty * ALPHA / 2 * away @ away
            (slope,) = torch.autograd.grad(objective, leaf)
            w = w - META_LR * slope
        dual = (dual if keeps_dual else 0) - ALPHA * (w - mean)
        mean = half * (w + mean) - half * dual / ALPHA
        expected_rounds.append((w, dual, mean))
    return expected_rounds, like


def state_of(learner):
    saved = learner.save()

    def part(start):
        return {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}

    return part("weights."), part("dual.weights."), part("anchor.weights.")


def test_each_round_follows_the_equations():
    tasks, learner = stream(ROUNDS), build()
    expected_rounds, like = reference(tasks)
    for task, right in zip(tasks, expected_rounds, strict=True):
        learner.score(task)
        assert len(learner.learn(task).steps) == META_STEPS
        for found, vector in zip(state_of(learner), right, strict=True):
            assert_close(found, shaped(vector, like), 1e-12)


@pytest.mark.parametrize("wrong", [{"keeps_dual": False}, {"half": 0.45}, {"penalty": 0.9}])
def test_the_check_distinguishes_other_algorithms(wrong):
    tasks, learner = stream(ROUNDS), build()
    play(learner, tasks)
    expected_rounds, like = reference(tasks, **wrong)
    assert relative_error(state_of(learner)[0], shaped(expected_rounds[-1][0], like)) > 1e-4


def test_the_dual_is_the_gradient_at_the_minimum_of_the_objective():
    """The first-order condition: grad F_t(w_{t+1}) - lambda_t + alpha (w_{t+1} - omega_t) = 0."""
    tasks = stream(2)
    learner = moml.build(context(), alpha=5.0, steps=40)
    play(learner, tasks)
    w, dual, _ = state_of(learner)
    leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    adapted = slow.adapt(net(), leaves, tasks[-1].support, LR, STEPS)
    slopes = torch.autograd.grad(slow.loss_of(net(), adapted, tasks[-1].query), list(leaves.values()))
    assert_close(dual, dict(zip(leaves, slopes, strict=True)), 1e-6)


def test_the_parameters_of_the_rule_are_learned_and_have_duals():
    module = net()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.meta_sgd(lr=LR), STEPS)
    learner = build(inner=inner, gradient=om.exact(inner), start=inner.init(weights_of(module)))
    play(learner, stream(2))
    saved = learner.save()
    rates = [name for name in saved if name.startswith("rule.")]
    assert rates
    assert all(not torch.equal(saved[name], torch.full_like(saved[name], LR)) for name in rates)
    assert all(saved[f"dual.{name}"].any() for name in rates)


def test_its_state_has_constant_size_and_no_past_task_is_read():
    assert set(bytes_held(build(buffer=Unread()))) == {3 * sum(value.nbytes for value in weights_of(net()).values())}


@pytest.mark.parametrize("part", ["support", "query"])
def test_a_task_that_is_not_finite_changes_no_bit_of_the_state(part):
    good = stream(4)
    poisoned, clean = build(), build()
    expected_rounds = play(poisoned, [*good[:2], poison(part), *good[2:]])
    assert [step.skipped for step in expected_rounds[2][1].steps] == ["not_finite"]
    play(clean, good)
    assert frozen(poisoned.save()) == frozen(clean.save())


def test_the_schedule_multiplies_the_learning_rate():
    tasks = stream(1)
    slower = moml.build(context(schedule=lambda round: 0.25), alpha=ALPHA, steps=1)
    same = moml.build(setup(engine=lambda meta: om.MetaOptimizer(meta, "sgd", 0.25 * META_LR)), alpha=ALPHA, steps=1)
    play(slower, tasks)
    play(same, tasks)
    assert frozen(slower.save()) == frozen(same.save())


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": float("nan")}, {"steps": 0}])
def test_options_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="alpha is"):
        moml.build(setup(), **wrong)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(world, in_order):
    tasks = [*stream(3), poison(), *stream(2, seed=1)]
    check_ranks_agree(world, in_order, build, tasks, META_LR)
