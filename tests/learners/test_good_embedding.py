"""A good embedding: which classes it knows, how it learns them, and how it answers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import online_meta as om
from online_meta import rules
from online_meta.learners.good_embedding import BIAS, WEIGHT, _digest_rows, build
from online_meta.replay.all import all as every_round
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learner_problems import LR, STEPS, net, setup, weights_of
from online_meta.testing.oracle import central_difference

WAYS, CLASSES = 2, 12


def pool_of_classes(classes=6, samples=8, seed=0):
    """Return the inputs (classes, samples, 3) of some classes."""
    random = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 1, 3, generator=random, dtype=torch.float64)
    return centres + 0.5 * torch.randn(classes, samples, 3, generator=random, dtype=torch.float64)


def task_of(pool, classes, support=(0, 1), query=(2, 3), *, global_labels=False):
    """Return the task of some classes, with the samples of these places."""

    def batch(places):
        x = torch.cat([pool[one, list(places)] for one in classes])
        labels = classes if global_labels else range(len(classes))
        return om.Batch(x, torch.tensor(list(labels)).repeat_interleave(len(places)))

    return om.Task(batch(support), batch(query))


def learner_of(module=None, loss="cross_entropy", classes=CLASSES, options=None, **changes):
    module = net() if module is None else module
    inner = om.Inner(om.model_loss(module, loss), rules.sgd(lr=LR), STEPS)
    context = setup(inner=inner, gradient=om.exact(inner), start=inner.init(weights_of(module)), **changes)
    return build(context, classes=classes, **(options or {}))


def play(learner, tasks):
    for task in tasks:
        learner.score(task)
        learner.learn(task)


def labels_of(learner, task):
    """Return the global classes of a task's samples, as a mapping of its local ones."""
    saved = learner.save()
    known = dict(zip(saved["labels.digests"].tolist(), saved["labels.classes"].tolist(), strict=True))
    found = {}
    for batch in task:
        for digest, y in zip(_digest_rows(batch), batch.y.tolist(), strict=True):
            if digest in known:
                found.setdefault(y, set()).add(known[digest])
    return found


# Which classes it knows.


def test_a_class_is_known_by_a_sample_that_was_seen_before_whatever_its_local_label():
    pool, learner = pool_of_classes(), learner_of()
    first, second = task_of(pool, (0, 1)), task_of(pool, (2, 0), query=(4, 5))
    play(learner, [first, second])
    assert labels_of(learner, first) == {0: {0}, 1: {1}}
    assert labels_of(learner, second) == {0: {2}, 1: {0}}
    third = task_of(
        pool, (0, 3), support=(5, 6), query=(7,)
    )  # It shares only a sample of the second task with class 0.
    play(learner, [third])
    assert labels_of(learner, third) == {0: {0}, 1: {3}}
    assert learner.save()["labels.seen"].tolist() == [True] * 4 + [False] * 8


def test_samples_that_are_never_repeated_are_new_classes():
    """The limit of going by content: without a shared sample nothing tells that two classes are one."""
    pool, learner = pool_of_classes(), learner_of()
    play(learner, [task_of(pool, (0, 1)), task_of(pool, (0, 1), support=(4, 5), query=(6, 7))])
    assert int(learner.save()["labels.seen"].sum()) == 4


def test_padding_and_ignored_samples_make_no_class():
    pool, learner = pool_of_classes(), learner_of()
    plain = task_of(pool, (0, 1))
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    x = torch.cat([plain.support.x[:3], torch.zeros(1, 3).double()])
    padded = om.Task(om.Batch(x, plain.support.y, weight), plain.query)
    other = task_of(pool, (2, 3))
    again = om.Task(
        om.Batch(torch.cat([other.support.x[:3], torch.zeros(1, 3).double()]), other.support.y, weight), other.query
    )
    play(learner, [padded, again])
    assert int(learner.save()["labels.seen"].sum()) == 4
    assert len(learner.save()["labels.digests"]) == 14


def test_classes_that_the_classifier_has_no_row_for_are_not_learned():
    pool, learner = pool_of_classes(), learner_of(classes=3)
    play(learner, [task_of(pool, (0, 1)), task_of(pool, (2, 3))])
    assert learner.save()["labels.seen"].tolist() == [True] * 3
    assert set(learner.save()["labels.classes"].tolist()) == {0, 1, 2}
    before = {name: value.clone() for name, value in learner.engine.meta().weights.items()}
    found = learner._differentiate(learner.engine.meta(), task_of(pool, (4, 5)))
    assert float(found.loss) == 0.0
    assert not any(value.any() for part in found.grads for value in part.values())
    assert_close(learner.engine.meta().weights, before, 0.0)


def test_only_some_samples_of_a_class_are_remembered():
    pool, learner = pool_of_classes(2, 300), learner_of()
    play(learner, [task_of(pool, (0, 1), support=range(200), query=range(200, 300))])
    assert torch.bincount(learner.save()["labels.classes"]).tolist() == [64, 64]


def test_with_global_labels_a_number_is_the_class():
    pool = pool_of_classes()
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    learner = learner_of(module, global_labels=True)
    play(
        learner, [task_of(pool, (4, 1), global_labels=True), task_of(pool, (4, 5), (4, 5), (6, 7), global_labels=True)]
    )
    saved = learner.save()
    assert saved["labels.seen"].nonzero().flatten().tolist() == [1, 4, 5]
    assert len(saved["labels.digests"]) == 0
    rows = learner.engine.meta().rule[WEIGHT].abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 4, 5]


# How it learns.


def test_it_is_trained_as_one_classifier_of_all_classes_by_plain_torch():
    """A copy of the model with a head of all known classes, trained by torch's Adam on the same samples."""
    pool, module = pool_of_classes(), net()
    learner = learner_of(module, replay=every_round(), steps_per_round=3, batch=10)
    orders = [(0, 1), (2, 0), (3, 2), (1, 3)]
    tasks = [task_of(pool, order, query=(2 + t, 3 + t)) for t, order in enumerate(orders)]

    trained, classifier = copy.deepcopy(module[:2]), nn.Linear(4, CLASSES).double()
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam([*trained.parameters(), *classifier.parameters()], lr=0.01)
    for t, task in enumerate(tasks):
        play(learner, [task])
        known = max(max(order) for order in orders[: t + 1]) + 1
        for _ in range(3):
            losses = []
            for order, past in zip(orders[: t + 1], tasks, strict=False):
                x = torch.cat([past.support.x, past.query.x])
                labels = torch.tensor(order)[torch.cat([past.support.y, past.query.y])]
                losses.append(F.cross_entropy(classifier(trained(x))[:, :known], labels))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    meta = learner.engine.meta()
    found = {"w": meta.weights["0.weight"], "b": meta.weights["0.bias"], "W": meta.rule[WEIGHT], "c": meta.rule[BIAS]}
    right = {"w": trained[0].weight, "b": trained[0].bias, "W": classifier.weight, "c": classifier.bias}
    assert_close(found, {name: value.detach() for name, value in right.items()}, 1e-9)
    assert torch.equal(meta.weights["2.weight"], module[2].weight), "the model's own head is not learned"


def test_its_gradient_is_the_slope_of_the_loss():
    pool, learner = pool_of_classes(), learner_of()
    play(learner, [task_of(pool, (0, 1)), task_of(pool, (2, 0))])
    task, meta = task_of(pool, (2, 1)), learner.engine.meta()
    found = learner._differentiate(meta, task)
    random = torch.Generator().manual_seed(0)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in meta.weights.items()}
    slope = central_difference(
        lambda weights: learner._differentiate(om.Meta(weights, meta.rule), task).loss, meta.weights, along
    )
    assert sum(float((found.grads.weights[n] * v).sum()) for n, v in along.items()) == pytest.approx(slope, rel=1e-5)


def test_features_of_known_classes_separate_new_ones():
    """The head of a new task on what was learned is better than on the weights of the start."""
    module = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    random = torch.Generator().manual_seed(1)
    mixing = torch.randn(30, 30, generator=random, dtype=torch.float64)

    def draw(t, count=5):
        """Classes differ in 3 of 30 mixed directions; in the others is noise."""
        own = torch.Generator().manual_seed(100 + t)
        centres = torch.zeros(3, 30).double()
        centres[:, :3] = 3 * torch.randn(3, 3, generator=own, dtype=torch.float64)
        y = torch.arange(3).repeat_interleave(2 * count)
        x = (centres[y] + torch.randn(len(y), 30, generator=own, dtype=torch.float64) * 1.5) @ mixing
        few = (torch.arange(len(y)) % (2 * count)) < 2
        return om.Task(om.Batch(x[few] / 10, y[few]), om.Batch(x[~few] / 10, y[~few]))

    learner = learner_of(module, classes=200, steps_per_round=5, batch=10, options={"head": "ridge_head"})
    fresh = learner_of(module, classes=200, options={"head": "ridge_head"})
    play(learner, [draw(t) for t in range(15)])
    new = [draw(1000 + t) for t in range(20)]
    before, after = (sum(one.score(task).accuracy for task in new) / len(new) for one in (fresh, learner))
    assert after > before + 0.05


# How it answers.


@pytest.mark.parametrize("head", ["logistic_head", "ridge_head", "nearest_centroid"])
def test_it_answers_by_the_head_of_a_rule_on_its_features(head):
    pool, learner = pool_of_classes(), learner_of(options={"head": head})
    play(learner, [task_of(pool, (0, 1)), task_of(pool, (2, 3))])
    task, state = task_of(pool, (4, 5)), learner.state()
    rule = getattr(rules, head)()
    inner = replace(learner.inner, rule=rule, steps=0)
    right = inner.adapt(om.Meta(state, rule.init(state)), task.support)
    found = {name: value[0] for name, value in learner.believe(state, task.support)[""].params.items()}
    assert_close(found, right, 0.0)
    assert relative_error(found, state) > 1e-3


# What is refused.


def test_numbers_are_refused():
    with pytest.raises(ValueError, match="good_embedding cannot answer this loss: it answers cross_entropy, categor"):
        learner_of(loss="mse")


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_model_whose_head_is_not_its_last_layer_is_refused():
    learner = learner_of(HeadFirst().double())
    with pytest.raises(ValueError, match=r"takes body.weight for that of the model's head.*make the head the last"):
        learner.score(task_of(pool_of_classes(), (0, 1)))
