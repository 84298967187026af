"""The baselines next to FTML: train on everything, fine-tuned follow the leader, online Reptile and from scratch."""

import copy

import pytest
import torch
from torch.nn import functional as F

import online_meta as om
from online_meta.functional.randomness import checksum
from online_meta.learners import from_scratch, ftl_fine_tune, ftml, online_reptile, train_on_everything
from online_meta.replay import ReplayPolicy, ReplayRequest
from online_meta.replay.all import all as every_round
from online_meta.replay.uniform import uniform
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import LR, STEPS, frozen, net, setup, stream, weights_of
from tests.learners import slow


def leaves(weights):
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


def test_train_on_everything_never_adapts():
    for score, _ in play(train_on_everything.build(setup()), stream(5)):
        assert score.loss_before == score.loss_after


@pytest.mark.parametrize("replay", [uniform(), every_round()])
def test_train_on_everything_is_joint_training_on_past_rounds(replay):
    tasks = stream(5)
    learner = train_on_everything.build(setup(replay=replay, seed=3))
    play(learner, tasks)
    module = net()
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    for round in range(5):
        for step in range(2 * (STEPS + 1)):
            samples = replay.sample(
                {}, ReplayRequest(3 + train_on_everything.SEED_OFFSET, round, step, range(round + 1), 3)
            )
            adam.zero_grad()
            for sample in samples:
                batch = slow.joined(tasks[sample.round])
                (F.mse_loss(module(batch.x), batch.y) / len(samples)).backward()
            adam.step()
    assert_close(learner.engine.meta().weights, weights_of(module), 1e-12)


def test_ftl_fine_tune_learns_without_adapting_and_adapts_when_scored():
    tasks = stream(5)
    learner = ftl_fine_tune.build(setup(seed=3))
    joint = train_on_everything.build(setup(seed=3 + ftl_fine_tune.SEED_OFFSET - train_on_everything.SEED_OFFSET))
    play(learner, tasks)
    play(joint, tasks)
    assert frozen(learner.save()) == frozen(joint.save())
    new = stream(1, seed=7)[0]
    adapted = slow.adapt(net(), leaves(learner.engine.meta().weights), new.support, LR, STEPS)
    found = learner.score(new)
    assert found.loss_before == joint.score(new).loss_before
    assert found.loss_after == pytest.approx(slow.loss_of(net(), adapted, new.query).item(), rel=1e-12)
    assert found.loss_after != found.loss_before


def test_online_reptile_steps_towards_the_ends_of_the_inner_loops():
    tasks, replay = stream(4), uniform()
    learner = online_reptile.build(setup(seed=3, engine=lambda meta: om.MetaOptimizer(meta, "sgd", 0.1)))
    play(learner, tasks)
    weights = weights_of(net())
    for round in range(4):
        for step in range(2):
            samples = replay.sample({}, ReplayRequest(3 + online_reptile.SEED_OFFSET, round, step, range(round + 1), 3))
            ends = [slow.adapt(net(), leaves(weights), slow.joined(tasks[p.round]), LR, STEPS) for p in samples]
            weights = {
                name: (value - 0.1 * sum(value - end[name] for end in ends) / len(ends)).detach()
                for name, value in weights.items()
            }
    assert_close(learner.engine.meta().weights, weights, 1e-12)


def test_train_on_everything_samples_independently_of_ftml():
    requests, sample = {}, uniform().sample

    def spy_for(name):
        def spy(memory, request):
            requests.setdefault(name, []).append(request)
            return sample(memory, request)

        return ReplayPolicy(spy)

    for name, module in (("ftml", ftml), ("everything", train_on_everything)):
        play(module.build(setup(replay=spy_for(name), batch=2)), stream(8))
    of_ftml, of_everything = (
        {(d.round, d.step): sample({}, d) for d in requests[name]} for name in ("ftml", "everything")
    )
    large = [key for key in of_ftml if key[0] >= 4]
    assert {d.batch for d in requests["everything"]} == {2}
    assert sum(of_ftml[key] != of_everything[key] for key in large) > len(large) / 2


def test_train_on_everything_makes_as_many_gradients_as_ftml_with_its_inner_loop():
    _, learned = play(train_on_everything.build(setup(steps_per_round=2)), stream(1))[0]
    assert len(learned.steps) == 2 * (STEPS + 1)


def test_train_on_everything_beats_its_own_start():
    task = stream(1)[0]
    learner = train_on_everything.build(setup(engine=lambda meta: om.MetaOptimizer(meta, "adam", 0.05)))
    losses = [score.loss_after for score, _ in play(learner, [task] * 20)]
    assert losses[-1] < 0.5 * losses[0]


def test_from_scratch_trains_fresh_weights_on_the_support_set_alone():
    learner = from_scratch.build(setup(), steps=7, lr=0.02)
    for task in stream(3):
        with torch.no_grad():
            before = float(F.mse_loss(net(100)(task.query.x), task.query.y))  # the weights of an empty support set
        module = net(100 + checksum(task.support))
        slow.train(module, task.support, 7, 0.02)
        with torch.no_grad():
            after = float(F.mse_loss(module(task.query.x), task.query.y))
        score = learner.score(task)
        assert (score.loss_before, score.loss_after) == pytest.approx((before, after), rel=1e-12)
        assert learner.learn(task) == om.Learned((), ())


def test_from_scratch_draws_weights_by_the_support_set_alone():
    """Neither the round nor the query set matters, so that a request is answered as the round will be scored."""
    tasks = stream(2)
    early, late = (from_scratch.build(setup(), steps=3) for _ in range(2))
    late.load({}, 7)
    for learner in (early, late):
        answers = [learner.answers({}, task.support, tasks[0].query.x)[""][0].outputs for task in tasks]
        assert not torch.equal(*answers)
        assert learner.score(tasks[0]).loss_after == float(F.mse_loss(answers[0][0], tasks[0].query.y))
    assert early.score(tasks[0]) == late.score(tasks[0])


def test_from_scratch_applies_its_options_and_does_not_change_the_drawn_weights():
    (task,), weights = stream(1), weights_of(net(3))
    kept = copy.deepcopy(weights)
    scores = {
        options: from_scratch.build(setup(draw_weights=lambda round: weights), *options).score(task)
        for options in ((0, 0.01), (5, 0.01), (6, 0.01), (5, 0.02))
    }
    assert len({score.loss_after for score in scores.values()}) == 4
    assert len({score.loss_before for score in scores.values()}) == 1
    assert scores[0, 0.01].loss_after == scores[0, 0.01].loss_before
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def test_from_scratch_does_not_depend_on_the_inner_loop():
    """It trains with Adam under any inner rule: neither the rule's steps nor its step size matter."""
    (task,) = stream(1)
    module = net()
    other = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=10 * LR), 9)
    assert from_scratch.build(setup(inner=other), 5).score(task) == from_scratch.build(setup(), 5).score(task)
