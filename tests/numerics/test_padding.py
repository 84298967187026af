"""Tasks of many sizes are padded to a few: with samples of weight 0, masks, and the same meta-gradients."""

import random

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.batches import map_tensors
from online_meta.batching import autotune, task_sum
from online_meta.batching.autotune import Autotuner
from online_meta.batching.padding import choose_sizes, measure, pad_task
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.task_sum import TaskSum
from online_meta.functional.model import explain_mixed_samples
from online_meta.rules.ridge_head import ridge_head
from online_meta.testing.compare import assert_close
from tests.numerics.problems import problem

STREAMS = {
    "both sets vary": lambda pick: (pick(14, 67), pick(14, 67)),
    "halves": lambda pick: (lambda n: (n // 2, n - n // 2))(pick(14, 67)),
    "the support set varies": lambda pick: (pick(14, 67), 15),
    "the query set varies": lambda pick: (5, pick(14, 67)),
    "a third is for the query": lambda pick: (lambda n: (n - n // 3, n // 3))(pick(14, 67)),
}


def setting(name="mlp_tanh", rule=None, steps=2):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule or om.rules.sgd(lr=0.1), steps)
    return om.exact(inner), inner.init(given.weights()), given.task


def same(found, right, tolerance=1e-10):
    assert_close(found.grads.weights, right.grads.weights, tolerance)
    torch.testing.assert_close(found.loss, right.loss, rtol=tolerance, atol=0)


def count_programs(monkeypatch):
    """Return the list of the signatures for which a program is recorded."""
    found = []
    for module in (task_sum, autotune):
        record = module.trace

        def counted(stacked_sum, meta, stacked, *others, record=record):
            found.append(signature_of(map_tensors(lambda one: one[0], stacked)))
            return record(stacked_sum, meta, stacked, *others)

        monkeypatch.setattr(module, "trace", counted)
    return found


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "layer_norm", "conv_group_norm", "sequence_attention", "sequence_torch_gru"]
)
def test_a_padded_task_has_the_same_meta_gradient(name):
    gradient, meta, make = setting(name)
    task = make(0, 5, 4)
    padded = pad_task(task, (8, 7), {})
    assert measure(padded, {}) == (8, 7)
    assert padded.support.weight.tolist() == [1.0] * 5 + [0.0] * 3
    same(gradient(meta, padded), gradient(meta, task), 1e-11)
    weighted = om.Task(*(batch._replace(weight=torch.rand(len(batch.x), dtype=torch.float64)) for batch in task))
    same(gradient(meta, pad_task(weighted, (8, 7), {})), gradient(meta, weighted), 1e-11)


@pytest.mark.parametrize("estimator", [om.first_order, om.reptile])
def test_other_estimators_and_heads_in_closed_form_are_padded_alike(estimator):
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, "mse"), om.rules.sgd(lr=0.1), 2)
    meta, task = inner.init(given.weights()), given.task(0, 5, 4)
    same(estimator(inner)(meta, pad_task(task, (16, 16), {})), estimator(inner)(meta, task), 1e-8)
    gradient, meta, _ = setting(rule=ridge_head())
    same(gradient(meta, pad_task(task, (16, 16), {})), gradient(meta, task), 1e-9)


def make_stream(make, stream, count):
    pick = random.Random(1)
    return [make(seed, *STREAMS[stream](pick.randint)) for seed in range(count)]


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_of_14_to_67_rows_a_task_has_at_most_six_plans(stream):
    gradient, meta, make = setting(steps=0)
    tasks, total = make_stream(make, stream, 60), TaskSum(gradient)
    assert len({signature_of(task) for task in tasks}) > 15
    tuner = Autotuner(total, 4, batching="vmap")
    for task in tasks:
        total.follow(tuner.find(meta, [task], total.plans.values()))
    assert 2 < len(total.plans) <= 6
    computed = [signature_of(total.fit(task)) in total.plans for task in tasks]
    assert sum(computed) >= 0.9 * len(tasks), "few tasks are left to the loop"
    sizes = sum(sum(measure(total.fit(task), {})) for task in tasks) / sum(sum(measure(task, {})) for task in tasks)
    assert sizes < 2.5, "and little is computed in vain"


def test_a_stream_of_14_to_67_rows_a_task_costs_at_most_six_recorded_programs(monkeypatch):
    gradient, meta, make = setting(steps=1)
    tasks, recorded = make_stream(make, "both sets vary", 20), count_programs(monkeypatch)
    mean = om.over_tasks(gradient, "traced")
    for first in range(0, len(tasks), 5):
        found = mean(meta, tasks[first : first + 5])
        right = om.over_tasks(gradient, "loop")(meta, tasks[first : first + 5])
        same(found, right)
    assert 2 < len(recorded) <= 6
    assert len({*recorded}) == len(recorded), "each is recorded once"


def test_tasks_of_one_or_two_sizes_are_not_padded():
    gradient, meta, make = setting(steps=1)
    total = TaskSum(gradient)
    tuner = Autotuner(total, 2, batching="vmap")
    tasks = [make(0, 5, 4), make(1, 9, 4), make(2, 5, 4)]
    total.follow(tuner.find(meta, tasks))
    assert [plan.pad for plan in total.plans.values()] == [(), ()]
    assert [total.fit(task) is task for task in tasks] == [True] * 3
    other = make(3, 6, 4)
    total.follow(tuner.find(meta, [other]))
    assert [plan.pad for plan in total.plans.values()] == [(), (), (8, 4)], "what never varies is not padded"
    assert len(total.fit(other).support.x) == 8
    assert total.fit(tasks[1]) is tasks[1]


def test_the_sizes_may_be_given():
    gradient, meta, make = setting(steps=1)
    total = TaskSum(gradient)
    tuner = Autotuner(total, 2, batching="vmap", pad_sizes=[8, 20])
    total.follow(tuner.find(meta, [make(0, 5, 4), make(1, 8, 9), make(2, 21, 4)]))
    assert [plan.pad for plan in total.plans.values()] == [(), (8, 20), (8, 8)]
    none = Autotuner(TaskSum(gradient), 2, batching="vmap", pad_sizes=[])
    found = none.find(meta, [make(seed, 5 + seed, 4) for seed in range(12)])
    assert [plan.pad for plan in found] == [()] * 8


def test_a_model_whose_samples_influence_each_other_is_not_padded(caplog):
    gradient, meta, make = setting("conv_batch_norm", steps=1)
    total = TaskSum(gradient)
    tuner = Autotuner(total, 2, batching="vmap")
    tasks = [make(seed, 5 + seed, 4) for seed in range(4)]
    total.follow(tuner.find(meta, tasks))
    assert [plan.pad for plan in total.plans.values()] == [()] * 4
    assert "are not padded, but computed one by one: it changes the meta-gradient by" in caplog.text
    same(total(meta, tasks, [1.0] * 4), TaskSum(gradient)(meta, tasks, [1.0] * 4))


def test_a_loss_that_takes_no_weights_is_not_padded(caplog):
    given = problem("mlp_tanh")
    inner = om.Inner(
        om.model_loss(given.module, lambda output, y: (output - y).square().mean()), om.rules.sgd(lr=0.1), 1
    )
    meta = inner.init(given.weights())
    tuner = Autotuner(TaskSum(om.exact(inner)), 2, batching="vmap")
    found = tuner.find(meta, [given.task(seed, 5 + seed, 4) for seed in range(4)])
    assert [plan.pad for plan in found] == [()] * 4
    assert "ValueError" in caplog.text


def test_auto_compares_padded_tasks_with_the_loop_over_tasks_as_they_are():
    gradient, meta, make = setting(steps=1)
    total = TaskSum(gradient)
    tuner = Autotuner(total, 3, measure_after=0.0)
    tasks = [make(seed, 5 + seed, 4) for seed in range(4)]
    total.follow(tuner.find(meta, tasks))
    assert {plan.pad for plan in total.plans.values()} == {(), (8, 4)}
    same(total(meta, tasks, [1.0] * 4), TaskSum(gradient)(meta, tasks, [1.0] * 4))


def test_plans_of_an_earlier_start_are_used_and_count():
    gradient, meta, make = setting(steps=1)
    first = Autotuner(TaskSum(gradient), 2, batching="vmap")
    known = first.find(meta, [make(seed, 5 + seed, 4) for seed in range(4)])
    second = Autotuner(TaskSum(gradient), 2, batching="vmap")
    found = second.find(meta, [make(7, 6, 4)], known)
    assert [plan.pad for plan in known] == [(), (), (8, 4)]
    assert found == known[2:]


def test_a_padded_plan_that_chose_the_loop_pads_nothing():
    gradient, _, make = setting()
    task = make(0, 5, 4)
    total = TaskSum(gradient)
    total.follow([ExecutionPlan("loop", 1, signature_of(pad_task(task, (8, 8), {})), pad=(8, 8))])
    assert total.fit(task) is task


class Tagger(nn.Module):
    """Classes for each token, and attention to those that the mask leaves."""

    def __init__(self):
        super().__init__()
        self.embedding, self.query, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        h = self.embedding(tokens)
        scores = (self.query(h) @ h.transpose(1, 2)).masked_fill(mask[:, None] == 0, -torch.inf)
        return self.head(h + scores.softmax(-1) @ h).transpose(1, 2)


class Classifier(Tagger):
    def forward(self, tokens, mask):
        each = super().forward(tokens, mask) * mask[:, None]
        return each.sum(-1) / mask.sum(-1, keepdim=True)


def sequences(seed, samples, length, tags):
    g = torch.Generator().manual_seed(seed)

    def batch(n):
        mask = (torch.rand(n, length, generator=g) < 0.8).double()
        mask[:, 0] = 1
        x = {"tokens": torch.randint(7, (n, length), generator=g), "mask": mask}
        y = torch.randint(3, (n, length) if tags else (n,), generator=g)
        return om.Batch(x, torch.where(mask > 0, y, -100) if tags else y)

    return om.Task(batch(samples), batch(4))


@pytest.mark.parametrize(("build", "tags"), [(Tagger, True), (Classifier, False)])
def test_sequences_with_a_mask_are_padded_too(build, tags, monkeypatch):
    torch.manual_seed(0)
    module, masks = build().double(), {"tokens": "mask"}
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.1), 1)
    meta, gradient = inner.init(dict(module.named_parameters())), om.exact(inner)
    task = sequences(0, 5, 9, tags)
    padded = pad_task(task, (8, 6, 12), masks)
    assert measure(padded, masks) == (8, 6, 12)
    assert padded.support.x["tokens"].shape == padded.support.x["mask"].shape == (8, 12)
    assert not padded.support.x["mask"][:, 9:].any()
    same(gradient(meta, padded), gradient(meta, task), 1e-11)
    recorded, pick = count_programs(monkeypatch), random.Random(0)
    mean = om.over_tasks(gradient, "traced" if tags else "vmap", masks=masks)
    for seed in range(8):
        one = sequences(seed, pick.randint(3, 9), pick.randint(5, 20), tags)
        same(mean(meta, [one]), gradient(meta, one))
    assert len(recorded) <= 6


@pytest.mark.parametrize("name", ["mlp_tanh", "layer_norm", "conv_group_norm", "conv_batch_norm", "conv_instance_norm"])
def test_one_changed_sample_shows_whether_samples_influence_each_other(name):
    given = problem(name)
    found = explain_mixed_samples(om.model_loss(given.module, given.loss), given.weights(), given.task(0).support)
    assert (found is not None) == (name == "conv_batch_norm")


def test_sizes_are_chosen_by_what_was_seen():
    seen = [(14, 14), (20, 33)]
    assert choose_sizes((40, 30), seen, [], None) == (64, 64)
    assert choose_sizes((14, 14), seen, [(64, 64)], None) == (16, 16), "not four times as much and more"
    assert choose_sizes((20, 20), seen, [(64, 64)], None) == (64, 64)
    assert choose_sizes((70, 20), seen, [(64, 64)], None) == (128, 128)
    four = [(64, 64), (16, 16), (128, 128), (32, 32)]
    assert choose_sizes((300, 2), seen, four, None) is None
    assert choose_sizes((2, 2), seen, four, None) == (16, 16)
    assert choose_sizes((1, 100), seen, [(64, 4)], None) == (1, 128), "a shape of its own is far smaller"
