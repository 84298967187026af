"""Every score precedes learning: the order is enforced, and a score uses the parameters before the round."""

import pytest
import torch

import online_meta as om
from online_meta.learners import from_scratch, ftml, train_on_everything
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.scoring import OrderError
from online_meta.testing.learner_problems import LR, STEPS, frozen, net, optimizer, setup, stream
from tests.learners import slow


def module_with(weights):
    module = net()
    module.load_state_dict(weights)
    return module


def ftml_reference(weights, task):
    """Return (loss before adaptation, loss after it) without the package."""
    module = module_with(weights)
    adapted = slow.adapt(module, dict(module.named_parameters()), task.support, LR, STEPS)
    with torch.no_grad():
        return tuple(float(slow.loss_of(module, w, task.query)) for w in (weights, adapted))


def unadapted_reference(weights, task):
    with torch.no_grad():
        return (float(slow.loss_of(net(), weights, task.query)),) * 2


def play(learner, tasks, learn_first=False):
    """Play the rounds; with ``learn_first``, learn each task before scoring it."""
    for task in tasks:
        for act in (learner.learn, learner.score) if learn_first else (learner.score, learner.learn):
            act(task)


REFERENCES = [(ftml.build, ftml_reference), (train_on_everything.build, unadapted_reference)]


@pytest.mark.parametrize(("build", "reference"), REFERENCES)
def test_a_score_uses_the_parameters_before_the_round(build, reference):
    learner = build(setup(engine=lambda meta: om.MetaOptimizer(meta, "adam", 0.05)))
    for task in stream(6):
        before = {name: weight.clone() for name, weight in learner.engine.meta().weights.items()}
        score = learner.score(task)
        learner.learn(task)
        assert (score.loss_before, score.loss_after) == pytest.approx(reference(before, task), rel=1e-12)
        seen = reference(learner.engine.meta().weights, task)
        assert abs(score.loss_after - seen[1]) > 1e-4 * seen[1], "the parameters after the round give another score"


def test_a_loop_that_learns_first_is_caught():
    for build in (ftml.build, train_on_everything.build, from_scratch.build):
        learner = build(setup())
        with pytest.raises(OrderError):
            play(learner, stream(2), learn_first=True)


def test_a_loop_that_learns_one_task_ahead_is_caught():
    learner, tasks = ftml.build(setup()), stream(3)
    learner.score(tasks[0])
    with pytest.raises(OrderError):
        learner.learn(tasks[0], tasks[1])


class LearnsBeforeScoring(FollowTheMetaLeader):
    """A learner whose score() learns before it scores."""

    def score(self, task):
        self.learn(task)
        return super().score(task)


class LearnsAfterScoring(FollowTheMetaLeader):
    """A learner whose score() learns after it scores."""

    def score(self, task):
        score = super().score(task)
        self.learn(task)
        return score


class ScoresTwice(FollowTheMetaLeader):
    """A learner whose score() scores, learns and returns the score of a second evaluation."""

    def score(self, task):
        super().score(task)
        self.learn(task)
        return super().score(task)


def made(kind):
    common = setup()
    return kind(common.inner, common.gradient, optimizer(common.start), batch=3)


@pytest.mark.parametrize("kind", [LearnsBeforeScoring, LearnsAfterScoring])
def test_a_learner_that_learns_within_score_is_caught(kind):
    learner = made(kind)
    with pytest.raises(OrderError):
        play(learner, stream(2))


def test_scoring_twice_is_detected_by_the_saved_state():
    """The contract that score() changes no state holds for FTML and detects this learner."""
    changed = {}
    for kind in (FollowTheMetaLeader, ScoresTwice):
        learner = made(kind)
        before = frozen(learner.save())
        learner.score(stream(1)[0])
        changed[kind] = frozen(learner.save()) != before
    assert changed == {FollowTheMetaLeader: False, ScoresTwice: True}


def test_the_query_set_does_not_influence_the_adapted_parameters():
    learner, (task, other) = ftml.build(setup()), stream(2)
    score = learner.score(task)
    exchanged = learner.score(om.Task(task.support, other.query))
    adapted = learner.inner.adapt(learner.engine.meta(), task.support)
    with torch.no_grad():
        assert score.loss_after == float(slow.loss_of(net(), adapted, task.query))
        assert exchanged.loss_after == float(slow.loss_of(net(), adapted, other.query))


def test_the_accuracy_is_measured_on_the_query_set_with_the_adapted_model():
    module = net()
    loss = om.model_loss(module, "cross_entropy")
    inner = om.Inner(loss, om.rules.sgd(lr=1.0), 5)
    tasks = [om.Task(*(om.Batch(b.x, b.y.argmax(-1)) for b in task)) for task in stream(4)]
    for build in (ftml.build, train_on_everything.build, from_scratch.build):
        learner = build(setup(inner=inner, gradient=om.exact(inner)))
        for task in tasks:
            score = learner.score(task)
            if build is ftml.build:
                adapted = inner.adapt(learner.engine.meta(), task.support)
                right = torch.func.functional_call(module, adapted, (task.query.x,)).argmax(-1) == task.query.y
                assert score.accuracy == right.double().mean()
            assert 0 <= score.accuracy <= 1
            learner.learn(task)
