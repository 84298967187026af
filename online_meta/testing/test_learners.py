"""What every online learner of ``online_meta.learners`` keeps."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load, save
from torch.utils._pytree import tree_leaves

import online_meta as om
import online_meta.learners
from online_meta import registry
from online_meta.answers import predict
from online_meta.batches import empty_like, map_tensors, select_samples
from online_meta.inner import AnswerRule
from online_meta.learners import BelievingLearner
from online_meta.meta_optimizer import flatten_meta
from online_meta.posteriors import samples
from online_meta.prediction import loss_of
from online_meta.regret.scoring import OrderError
from online_meta.testing.learned_rules import draws_by_key
from online_meta.testing.learner_problems import (
    answers_numbers,
    frozen,
    net,
    remembered,
    setup_for,
    stream_for,
    weights_of,
)
from online_meta.types import Batch, Belief, Task

NAMES = registry.names(online_meta.learners)
ROUNDS = 7
QUICK = {
    "from_scratch": {"steps": 4},
    "moml": {"steps": 3},
    "ridge_head": {"per": "both"},
    "logistic_head": {"per": "both"},
}
"""Options that keep the tests short, or with which a learner has a state."""

every_learner = pytest.mark.parametrize("name", NAMES)


def make(name, **changes):
    return registry.load_module(online_meta.learners, name).build(setup_for(name, **changes), **QUICK.get(name, {}))


def play(learner, tasks):
    """Score and learn the tasks one by one; return all that was said."""
    return [(learner.score(task), learner.learn(task)) for task in tasks]


@every_learner
def test_scoring_changes_nothing(name):
    learner, tasks = make(name), stream_for(name, 4)
    play(learner, tasks[:3])
    before = frozen(learner.save())
    first = learner.score(tasks[3])
    assert learner.score(tasks[3]) == first
    assert frozen(learner.save()) == before


@every_learner
@pytest.mark.parametrize("stop", range(ROUNDS))
def test_going_on_from_what_was_saved_gives_the_same_bits_as_never_stopping(name, stop):
    tasks, whole = stream_for(name, ROUNDS), make(name)
    play(whole, tasks[:stop])
    saved = whole.save()
    kept = frozen(saved)
    rest = play(whole, tasks[stop:])
    assert frozen(saved) == kept, "what was saved is not written any more"

    other = make(name, buffer=remembered(tasks[:stop]))
    other.load(saved, stop)
    assert play(other, tasks[stop:]) == rest
    assert frozen(other.save()) == frozen(whole.save())


@every_learner
def test_a_learner_can_go_back(name):
    tasks, learner = stream_for(name, ROUNDS), make(name)
    play(learner, tasks[:3])
    saved = learner.save()
    rest = play(learner, tasks[3:])
    learner.load(saved, 3)
    assert play(learner, tasks[3:]) == rest


@every_learner
def test_its_rate_can_be_scaled(name):
    tasks, learner = stream_for(name, 3), make(name)
    assert learner.lr_scale == 1.0
    before = None if learner.engine is None else frozen(flatten_meta(learner.engine.meta()))
    learner.lr_scale = 0.0
    for task in tasks:
        learner.score(task)
        learner.learn(task)
    learner.learn_more(0)
    if before is not None:
        assert frozen(flatten_meta(learner.engine.meta())) == before, "lr_scale is a factor of every step"
        learner.lr_scale = 0.5
        learner.score(tasks[0])
        learner.learn(tasks[0])
        assert frozen(flatten_meta(learner.engine.meta())) != before


@every_learner
def test_loading_forgets_what_was_scored(name):
    tasks, learner = stream_for(name, 2), make(name)
    saved = learner.save()
    learner.score(tasks[0])
    learner.load(saved, 0)
    with pytest.raises(OrderError):
        learner.learn(tasks[0])
    learner.score(tasks[1])
    learner.learn(tasks[1])


@every_learner
def test_a_prefix_is_scored_as_a_task_of_so_few_points_is(name):
    """With seeds, ranks and states all the same: only the points are fewer."""
    tasks = stream_for(name, 4)
    for points in (1, 2, 3):
        whole, short = make(name), make(name)
        for learner in (whole, short):
            play(learner, tasks[:3])
        score = whole.score(tasks[3], (1, 2, 3, 4, 9))
        assert [one.points for one in score.prefixes] == [1, 2, 3], "those that are shorter than the support set of 4"
        few = Task(Batch(*(tensor[:points] for tensor in tasks[3].support)), tasks[3].query)
        alone = short.score(few)
        assert score.prefixes[points - 1][1:] == (alone.loss_after, alone.accuracy)
        assert score[:3] == make_and_score(name, tasks)[:3], "the rest is as it is without"
        whole.learn(tasks[3])


def make_and_score(name, tasks):
    learner = make(name)
    play(learner, tasks[:3])
    return learner.score(tasks[3])


@every_learner
def test_what_is_learned_between_rounds_is_the_same_after_a_restart(name):
    tasks, whole = stream_for(name, 6), make(name)
    play(whole, tasks[:3])
    saved = whole.save()
    more = [whole.learn_more(update) for update in range(2)]
    rest = play(whole, tasks[3:5])
    assert all(step.skipped is None for steps in more for step in steps)

    other = make(name, buffer=remembered(tasks[:3]))
    other.load(saved, 3)
    assert [other.learn_more(update) for update in range(2)] == more
    assert play(other, tasks[3:5]) == rest
    assert frozen(other.save()) == frozen(whole.save())
    other.score(tasks[5])
    if more[0]:
        assert more[0] != more[1], "each update draws anew"
        with pytest.raises(OrderError, match=r"1 task\(s\) were scored but not learned"):
            other.learn_more(0)


@every_learner
def test_of_nothing_nothing_is_learned(name):
    learner = make(name)
    before = frozen(learner.save())
    assert learner.learn_more(0) == ()
    assert frozen(learner.save()) == before


def copy(task):
    return Task(*(Batch(*(tensor.clone() for tensor in batch)) for batch in task))


WRONG = {
    "nothing is learned": lambda a, b, other: [],
    "one is left out at the end": lambda a, b, other: [a],
    "one is left out at the beginning": lambda a, b, other: [b],
    "another order": lambda a, b, other: [b, a],
    "one twice": lambda a, b, other: [a, a],
    "another one besides": lambda a, b, other: [a, b, other],
    "another one instead": lambda a, b, other: [a, other],
    "a copy instead": lambda a, b, other: [a, copy(b)],
}


@every_learner
@pytest.mark.parametrize("choose", WRONG.values(), ids=WRONG)
def test_only_the_scored_tasks_are_learned_in_their_order(name, choose):
    first, *tasks = stream_for(name, 4)
    learner = make(name)
    play(learner, [first])
    before = frozen(learner.save())
    for task in tasks[:2]:
        learner.score(task)
    with pytest.raises(OrderError, match="scored"):
        learner.learn(*choose(*tasks))
    assert frozen(learner.save()) == before
    learner.learn(*tasks[:2])  # the right ones are still there to be learned


@every_learner
def test_nothing_is_learned_that_was_not_scored(name):
    learner, tasks = make(name), stream_for(name, 2)
    for given in ([], tasks[:1]):
        with pytest.raises(OrderError, match="score"):
            learner.learn(*given)
    play(learner, tasks[:1])
    with pytest.raises(OrderError):
        learner.learn(tasks[0])


@every_learner
def test_several_tasks_in_one_update_are_scored_alike_and_count_as_so_many_rounds(name):
    tasks, learner = stream_for(name, ROUNDS), make(name)
    play(learner, tasks[:2])
    saved = learner.save()
    together = [learner.score(task) for task in tasks[2:5]]
    assert frozen(learner.save()) == frozen(saved)
    learned = learner.learn(*tasks[2:5])
    assert set(learned.replayed) <= set(range(5))

    for round, score in zip((2, 3, 4), together, strict=True):  # each as if it were the only one of its round
        alone = make(name)
        alone.load(saved, round)
        assert alone.score(tasks[round]) == score

    other = make(name, buffer=remembered(tasks[:5]))
    other.load(learner.save(), 5)
    assert play(other, tasks[5:]) == play(learner, tasks[5:])


@every_learner
def test_the_same_seed_gives_the_same_bits_whatever_torch_drew_in_between(name):
    tasks, one, two = stream_for(name, ROUNDS), make(name), make(name)
    said = play(one, tasks)
    torch.manual_seed(77)
    assert play(two, tasks) == said
    assert frozen(two.save()) == frozen(one.save())


def test_scores_do_not_depend_on_the_order_of_the_learners():
    tasks, said = {name: stream_for(name, 5) for name in NAMES}, []
    half = len(NAMES) // 2
    for order in (NAMES, NAMES[::-1], NAMES[half:] + NAMES[:half]):  # Each is behind and before each other one.
        learners = {name: make(name) for name in order}
        scores = []
        for round in range(5):
            scored = {name: learner.score(tasks[name][round]) for name, learner in learners.items()}
            for name, learner in learners.items():
                learner.learn(tasks[name][round])
            scores.append(scored)
        said.append((scores, {name: frozen(learner.save()) for name, learner in learners.items()}))
    assert all(other == said[0] for other in said)


@every_learner
def test_learners_may_share_a_past_in_any_order(name):
    tasks, shared = stream_for(name, 5), setup_for(name)
    alike = [one for one in NAMES if answers_numbers(one) == answers_numbers(name)]
    modules = {one: registry.load_module(online_meta.learners, one) for one in alike}
    both = [modules[one].build(shared, **QUICK.get(one, {})) for one in (name, *alike)]
    said = [[learner.score(task) for learner in both] + [learner.learn(task) for learner in both] for task in tasks]
    alone = make(name)
    assert [(line[0], line[len(both)]) for line in said] == play(alone, tasks)


@every_learner
def test_what_is_saved_is_plain_tensors_without_a_graph(name):
    learner = make(name)
    play(learner, stream_for(name, 2))
    for value in learner.save().values():
        assert isinstance(value, torch.Tensor)
        assert not value.requires_grad


ANSWERING = {**QUICK, "dp_mixture": {"concentration": 4.0}}
"""Options of the learners whose answers are tested: the mixture has several components."""


def answering(name, loss=None, rounds=3, answer_steps=(), **inner):
    """Return a learner that has learned some rounds, and the next task; ``inner`` changes its inner loop."""
    *tasks, task = stream_for(name, rounds + 1)
    saved = learn(name, loss, rounds, tuple(inner.items()))
    learner = build(name, loss, remembered(tasks), answer_steps=answer_steps, **inner)
    learner.load(saved, rounds)
    return learner, task


@cache
def learn(name, loss, rounds, inner):
    """Return what a learner saves after some rounds."""
    learner = build(name, loss, **dict(inner))
    play(learner, stream_for(name, rounds))
    return learner.save()


def build(name, loss=None, buffer=None, **inner):
    """Return a learner at round 0; ``loss`` is for those that answer numbers."""
    loss = (loss or "mse") if answers_numbers(name) else "cross_entropy"
    inner = om.Inner(om.model_loss(net(), loss), **{"rule": om.rules.sgd(lr=0.05), "steps": 2, **inner})
    changes = {} if buffer is None else {"buffer": buffer}
    context = setup_for(name, inner=inner, gradient=om.exact(inner), start=inner.init(weights_of(net())), **changes)
    return registry.load_module(online_meta.learners, name).build(context, **ANSWERING.get(name, {}))


def bits(tree):
    """Return all bits of a tree of tensors, to be compared with ==."""
    return [(str(leaf.dtype), tuple(leaf.shape), leaf.numpy().tobytes()) for leaf in tensors_of(tree)]


def tensors_of(tree):
    """Return the tensors of a tree; outcomes are functions and not among them."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


KEYED = {"rule": draws_by_key(), "posterior": samples(), "samples": 2}
"""An inner loop that draws, and answers with a mixture of its draws."""

every_inner = pytest.mark.parametrize("inner", [{}, KEYED], ids=["sgd", "draws"])


@every_learner
@every_inner
def test_an_answer_is_a_pure_function_of_what_is_published(name, inner):
    learner, task = answering(name, **inner)
    state, saved = learner.state(), frozen(learner.save())
    given = frozen(state), bits(task)
    first = learner.answers(state, task.support, task.query.x)
    assert "" in first
    assert all(not leaf.requires_grad for leaf in tensors_of(first))
    torch.manual_seed(77)
    with torch.inference_mode():
        again = learner.answers(learner.state(), map_tensors(torch.clone, task.support), task.query.x.clone())
    assert (bits(again), list(again)) == (bits(first), list(first))
    assert (frozen(state), bits(task)) == given, "nothing is written to the arguments"
    assert frozen(learner.save()) == saved, "the learner is as it was"
    assert frozen(learner.state()) == given[0]


@every_learner
@every_inner
def test_another_process_answers_the_same_bits_from_what_was_published(name, inner):
    learner, task = answering(name, **inner)
    state = learner.state()
    published = load(save({key: value.contiguous() for key, value in state.items()}))
    right = learner.answers(state, task.support, task.query.x)
    play(learner, [task])
    other = build(name, **inner).answers(published, task.support, task.query.x)
    assert bits(other) == bits(right)


@every_learner
@pytest.mark.parametrize("loss", ["mse", "gaussian_of_noise"])
def test_a_score_is_the_loss_of_the_answer(name, loss):
    learner, task = answering(name, loss, answer_steps=(1, 4))
    support, (x, y) = task
    state = learner.state()

    def losses(of):
        return {suffix: float(loss_of(found, y)) for suffix, found in learner.answers(state, of, x).items()}

    scores = learner.scores(task, (1, 3))
    assert {suffix: score.loss_after for suffix, score in scores.items()} == losses(support)
    assert {suffix: score.loss_before for suffix, score in scores.items()} == losses(empty_like(support))
    for place, points in enumerate((1, 3)):
        found = {suffix: score.prefixes[place] for suffix, score in scores.items()}
        assert {one.points for one in found.values()} == {points}
        first = select_samples(support, slice(points))
        assert {suffix: one.loss for suffix, one in found.items()} == losses(first)
    assert learner.score(task, (1, 3)) == scores[""]


@every_learner
@every_inner
@pytest.mark.parametrize("points", [0, 1])
def test_an_answer_to_little_support_is_a_distribution(name, inner, points):
    for learner, task in (answering(name, **inner), answering(name, rounds=0, **inner)):
        support, shape = select_samples(task.support, slice(points)), (len(task.query.y), 2)
        for prediction in learner.answers(learner.state(), support, task.query.x).values():
            assert all(part.outputs.shape == (len(part.log_weights), *shape) for part in prediction)
            assert all(bool(part.outputs.isfinite().all()) for part in prediction)
            total = torch.cat([part.log_weights for part in prediction]).exp().sum()
            torch.testing.assert_close(total, torch.ones_like(total))


@every_learner
@every_inner
def test_an_answer_without_support_takes_no_step(name, inner):
    learner, task = answering(name, **inner)
    nothing = empty_like(task.support)
    found = learner.answers(learner.state(), nothing, task.query.x)
    for steps in (0, 5):
        other = build(name, **inner, steps=steps).answers(learner.state(), nothing, task.query.x)
        assert bits(other) == bits(found)


@every_learner
def test_the_order_of_the_support_set_does_not_matter_unless_a_learner_says_so(name):
    learner, task = answering(name)
    if getattr(learner, "order_matters", False):
        return
    order = torch.tensor([2, 0, 3, 1])
    found, other = (
        learner.answers(learner.state(), support, task.query.x)[""]
        for support in (task.support, select_samples(task.support, order))
    )
    for part, same in zip(found, other, strict=True):
        torch.testing.assert_close(part.outputs, same.outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.log_weights, same.log_weights, rtol=1e-9, atol=1e-9)


@every_learner
@every_inner
def test_an_answer_after_another_number_of_steps_is_that_of_a_learner_with_so_many(name, inner):
    learner, task = answering(name, answer_steps=(1, 2, 4), **inner)
    state = learner.state()
    found = learner.answers(state, task.support, task.query.x)
    if getattr(learner, "inner", None) is not None and learner.inner.answer_steps:
        assert list(found) == ["", "@1", "@4"], "2 is its own number of steps"
    for suffix, prediction in found.items():
        own = {"steps": int(suffix[1:])} if suffix else {}
        alone = build(name, **{**inner, **own}).answers(state, task.support, task.query.x)
        assert list(alone) == [""]
        assert bits(alone[""]) == bits(prediction)


@every_learner
@every_inner
def test_an_answer_with_another_head_changes_no_other_answer(name, inner):
    learner, task = answering(name, answer_steps=(0,), answer_heads=("ridge_head",), **inner)
    state, x = learner.state(), task.query.x
    found = learner.answers(state, task.support, x)
    plain = build(name, answer_steps=(0,), **inner).answers(state, task.support, x)
    adapts = getattr(learner, "inner", None) is not None and bool(learner.inner.answer_heads)
    assert list(found) == [*plain, *(["@ridge_head"] if adapts else [])]
    assert all(bits(found[suffix]) == bits(one) for suffix, one in plain.items())
    if adapts:
        assert bits(found["@ridge_head"]) != bits(found["@0"])
        nothing = learner.answers(state, empty_like(task.support), x)
        assert bits(nothing["@ridge_head"]) == bits(nothing["@0"])


ADAM = AnswerRule("adam", om.rules.adam(lr=0.05), (3, 1))


@every_learner
def test_an_answer_by_another_rule_changes_no_other_answer(name):
    learner, task = answering(name, answer_steps=(0,), answer_rules=(ADAM,))
    state, x = learner.state(), task.query.x
    found = learner.answers(state, task.support, x)
    plain = build(name, answer_steps=(0,)).answers(state, task.support, x)
    adapts = getattr(learner, "inner", None) is not None and bool(learner.inner.answer_rules)
    assert list(found) == [*plain, *(["@adam1", "@adam3"] if adapts else [])]
    assert all(bits(found[suffix]) == bits(one) for suffix, one in plain.items())
    if adapts:
        assert bits(found["@adam1"]) != bits(found["@adam3"])


def test_an_answer_by_another_rule_is_that_of_its_inner_loop_from_the_same_weights():
    learner, task = answering("ftml", answer_rules=(ADAM,))
    state, (support, x) = learner.state(), (task.support, task.query.x)
    other = replace(learner.inner, rule=ADAM.rule, steps=3, answer_rules=())
    phi = {name: value.clone().requires_grad_() for name, value in state.items()}
    optimizer = torch.optim.Adam(list(phi.values()), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        other.loss(phi, support).backward()
        optimizer.step()
    right = predict(other.loss, Belief({k: v.detach()[None] for k, v in phi.items()}, torch.zeros(1)), x)
    torch.testing.assert_close(learner.answers(state, support, x)["@adam3"][0].outputs, right[0].outputs)
    with pytest.raises(ValueError, match="steps of the answers by 'adam' are"):
        replace(learner.inner, answer_rules=(ADAM._replace(steps=()),))


@every_learner
@every_inner
def test_what_is_believed_predicts_what_is_answered(name, inner):
    learner, task = answering(name, answer_steps=(1, 4), answer_heads=("ridge_head",), **inner)
    if not isinstance(learner, BelievingLearner):
        return
    state = learner.state()
    beliefs = learner.believe(state, task.support)
    found = learner.answers(state, task.support, task.query.x)
    assert list(beliefs) == list(found)
    for suffix, belief in beliefs.items():
        assert bits(predict(learner.inner.loss, belief, task.query.x)) == bits(found[suffix])
