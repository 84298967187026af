"""The samples that are drawn of a revisited task: unbiased, a function of a key, and the same on every rank."""

from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch

import online_meta as om
from online_meta.batches import concat_support_query, count_samples, map_tensors, select_samples
from online_meta.batching.task_sum import TaskSum
from online_meta.learners import ftml, train_on_everything
from online_meta.metagrads.supervised import supervised
from online_meta.replay._task_draw import DrawnTasks, TaskDraw
from online_meta.testing.compare import relative_error
from online_meta.testing.learner_problems import frozen, setup, stream, task
from tests.learners.ranks import check_ranks_agree

SETUP = setup()
TASK = task(0, support=4, query=5)
DRAWS = 3000


def rows(batch, within):
    """Return the positions in ``within`` of the rows of ``batch``."""
    return tuple(int((within.x == x).all(1).nonzero()) for x in batch.x)


def mean_gradient(tasks, gradient=SETUP.gradient):
    found = [gradient(SETUP.start, one).grads.weights for one in tasks]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def subsets(batch, count):
    return [select_samples(batch, torch.tensor(chosen)) for chosen in combinations(range(count_samples(batch)), count)]


def test_every_set_of_rows_is_drawn_equally_often():
    draw = TaskDraw(2, 3)
    drawn = [draw.draw(TASK, 7, t) for t in range(DRAWS)]
    for place, (count, sets) in enumerate(((2, 6), (3, 10))):
        found = Counter(rows(one[place], TASK[place]) for one in drawn)
        assert found.keys() == set(combinations(range(count_samples(TASK[place])), count)), "all, and in their order"
        expected = DRAWS / sets
        assert sum((seen - expected) ** 2 / expected for seen in found.values()) < 30, "chi-squared of 5 and 9"


def test_the_expected_meta_gradient_over_all_draws_of_query_samples_is_that_of_the_whole_query_set():
    for support in (TASK.support, *subsets(TASK.support, 2)):
        drawn = mean_gradient(om.Task(support, query) for query in subsets(TASK.query, 3))
        assert relative_error(drawn, mean_gradient([om.Task(support, TASK.query)])) < 1e-13


def test_the_expected_meta_gradient_over_all_draws_is_that_of_the_mean_loss_of_as_many_support_samples():
    drawn = mean_gradient(om.Task(s, q) for s in subsets(TASK.support, 2) for q in subsets(TASK.query, 3))
    right = mean_gradient(om.Task(s, TASK.query) for s in subsets(TASK.support, 2))
    assert relative_error(drawn, right) < 1e-13
    assert relative_error(drawn, mean_gradient([TASK])) > 1e-3, "two samples are others than four"


@pytest.mark.parametrize("weight", [(1.0, 0.0, 2.0, 0.5, 0.5), (8.0, 0.25, 0.5, 0.0, 0.25)])
def test_rows_with_weights_are_drawn_in_proportion_to_them(weight):
    """So the mean over what is drawn is unbiased: a row that is drawn h times of 3 has h / 3 of the loss."""
    weight = torch.tensor(weight, dtype=torch.float64)
    given = om.Task(TASK.support, TASK.query._replace(weight=weight))
    drawn = [TaskDraw(query=3).draw(given, t).query for t in range(DRAWS)]
    assert all(torch.equal(one.weight, torch.full((3,), float(weight.sum()) / 3, dtype=torch.float64)) for one in drawn)
    hits = torch.bincount(torch.tensor([rows(one, TASK.query) for one in drawn]).flatten(), minlength=5) / DRAWS
    torch.testing.assert_close(hits.double(), 3 * weight / weight.sum(), rtol=0, atol=0.04)
    assert not hits[weight == 0].any()


def test_ignored_classes_and_padding_are_not_drawn():
    y = torch.tensor([0, -100, 1, -100, 1, -100])
    batch = om.Batch(torch.arange(6.0)[:, None], y)
    found = [TaskDraw(2).draw(om.Task(batch, batch), t).support for t in range(50)]
    assert {int(label) for one in found for label in one.y} == {0, 1}
    empty = batch._replace(weight=torch.zeros(6))
    assert TaskDraw(2).draw(om.Task(empty, batch), 0).support.weight.tolist() == [0, 0], "nothing counts in it"


def test_joint_training_is_unbiased_too():
    """A drawn row stands for those that are left out, so that support and query keep their shares."""
    draw, gradient = TaskDraw(1, 3, weighs=True), supervised(SETUP.inner)
    found = {}
    for t in range(300):
        one = draw.draw(TASK, t)
        found[rows(one.support, TASK.support) + rows(one.query, TASK.query)] = one
    assert len(found) == 4 * 10, "every draw"
    assert float(concat_support_query(one).weight.sum()) == 9
    assert relative_error(mean_gradient(found.values(), gradient), mean_gradient([TASK], gradient)) < 1e-12
    plain = [draw._replace(weighs=False).draw(TASK, t) for t in range(1)]
    assert plain[0].support.weight is None


def test_a_draw_is_a_function_of_seed_rounds_and_step():
    draw, tasks = TaskDraw(2, 2), {3: TASK, 4: TASK}
    first = DrawnTasks(draw, tasks, 1, 9, 0)
    same = map_tensors(torch.equal, first[3], DrawnTasks(draw, tasks, 1, 9, 0)[3])
    assert all(one for batch in same for one in batch)
    others = [DrawnTasks(draw, tasks, *key)[round] for key, round in (((1, 9, 0), 4), ((1, 9, 1), 3), ((1, 8, 0), 3))]
    others += [DrawnTasks(draw, tasks, 2, 9, 0)[3]]
    found = {rows(one.support, TASK.support) + rows(one.query, TASK.query) for one in (first[3], *others)}
    assert len(found) > 3


def test_a_set_that_is_not_larger_is_taken_as_it_is():
    assert TaskDraw().draw(TASK, 0) is TASK
    found = TaskDraw(4, 9).draw(TASK, 0)
    assert found.support is TASK.support
    assert found.query is TASK.query


@pytest.mark.parametrize("build", [ftml.build, train_on_everything.build])
def test_scores_use_all_samples_and_steps_those_drawn(build):
    learner, whole = build(setup(draw=TaskDraw(2, 1))), build(setup())
    first, *others = stream(3)
    assert learner.score(first) == whole.score(first)
    for one in (learner, whole):
        one.learn(first)
    assert frozen(learner.save()) != frozen(whole.save())
    assert count_samples(learner.task_sum.example(others[0]).support) == 2, "plans are for the shapes that are drawn"


def test_a_learner_of_the_slow_way_finds_the_same_parameters():
    """Two steps a round, on the samples that the keys of round, step and revisited round give."""
    draw, tasks = TaskDraw(2, 1), stream(3)
    learner = ftml.build(setup(draw=draw, batch=10))
    slow = setup().engine(SETUP.start)
    for t, one in enumerate(tasks):
        learner.score(one)
        learner.learn(one)
        for step in range(2):
            drawn = [draw.draw(tasks[past], SETUP.seed, t, step, past) for past in range(t + 1)]
            slow.apply(TaskSum(SETUP.gradient)(slow.meta(), drawn, [1.0] * len(drawn)), float(len(drawn)))
    assert frozen(learner.engine.meta().weights) == frozen(slow.meta().weights)


@pytest.mark.parametrize("world", [2, 3])
def test_every_number_of_ranks_draws_the_same_samples(world):
    def build(**changes):
        return ftml.build(
            setup(**{"engine": partial(om.MetaOptimizer, name="sgd", lr=0.1), **changes}, draw=TaskDraw(2, 1))
        )

    check_ranks_agree(world, True, build, stream(4), 0.1)
