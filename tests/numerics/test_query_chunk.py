"""The query set in chunks: the same gradient with the graph of a part of the samples, or a clear refusal."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.batching.padding import pad_task
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import CRITERIA
from online_meta.testing.unrolled import Loop
from tests.numerics.meter import MemoryMeter
from tests.numerics.problems import problem
from tests.numerics.reference_loop import join_parts, shifted

ESTIMATORS = {"exact": (om.exact, False), "first_order": (om.first_order, True)}
FITTING = ("mlp_tanh", "conv_group_norm", "sequence_transformer")


def setting(name, steps=3, loss=None):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, loss or given.loss), om.rules.meta_sgd(lr=0.1), steps)
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize(("make", "constant"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_gradient_in_chunks_is_that_of_the_whole_set(make, constant, name, rows):
    given, inner, meta = setting(name)
    task = given.task(0)
    right = Loop(given.module, given.loss, inner.rule, 3, ("*",)).gradient(meta, task, constant_gradients=constant)
    for one in (task, pad_task(task, (8, 11), {})):
        found = make(inner, query_chunk=rows)(meta, one)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
        assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


def sum_over_pairs(output, y):
    """A loss of all pairs of samples, which no mean over chunks can be."""
    return ((output[:, None] - output) ** 2).sum() / 10 + CRITERIA["mse"](output, y)


def test_any_loss_of_the_outputs_is_exact(monkeypatch):
    monkeypatch.setitem(CRITERIA, "pairs", sum_over_pairs)
    given, inner, meta = setting("mlp_tanh", loss=sum_over_pairs)
    right = Loop(given.module, "pairs", inner.rule, 3, ("*",)).gradient(meta, given.task(0))
    found = om.exact(inner, query_chunk=3)(meta, given.task(0))
    assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


def test_entries_that_do_not_count_are_those_of_the_whole_set():
    given, inner, meta = setting("conv_group_norm")
    task = given.task(0, 6, 6)
    task = task._replace(query=task.query._replace(y=torch.tensor([0, -100, -100, 1, 2, 0])))
    right = Loop(given.module, given.loss, inner.rule, 3, ("*",)).gradient(meta, task)
    assert_close(join_parts(om.exact(inner, query_chunk=2)(meta, task).grads), join_parts(right.grads), 1e-10)


def test_stacked_tasks_are_computed_in_chunks():
    given, inner, meta = setting("conv_group_norm")
    tasks = [given.task(seed) for seed in range(2)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    together = torch.func.vmap(lambda task: om.exact(inner, query_chunk=2)(meta, task))(stacked)
    for at, task in enumerate(tasks):
        right = om.exact(inner)(meta, task)
        assert_close(
            {name: value[at] for name, value in join_parts(together.grads).items()}, join_parts(right.grads), 1e-9
        )


def test_a_loss_after_each_step_is_computed_in_chunks():
    given, inner, meta = setting("mlp_tanh")
    weights = (0.2, 0.0, 0.8)
    right = Loop(given.module, given.loss, inner.rule, 3, ("*",)).gradient(meta, given.task(0), step_weights=weights)
    found = om.exact(inner, query_chunk=3, step_weights=weights, rematerialise=True)(meta, given.task(0))
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


@pytest.mark.parametrize("name", ["mlp_dropout", "sequence_transformer_dropout"])
def test_both_passes_draw_the_same_numbers(name):
    given, inner, meta = setting(name)
    gradient, task = om.exact(inner, query_chunk=2), given.task(0)
    found = gradient(meta, task)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(gradient(meta, task)), strict=True))
    torch.manual_seed(1)
    along = {name: torch.randn_like(value) for name, value in meta.weights.items()}

    def loss_at(far):
        return gradient(meta._replace(weights={n: w + far * along[n] for n, w in meta.weights.items()}), task).loss

    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    right = sum((found.grads.weights[name] * along[name]).sum() for name in along)
    torch.testing.assert_close(slope, right, rtol=1e-6, atol=1e-8)


def test_the_graph_is_that_of_one_chunk():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )
    module(torch.zeros(1, 1, 12, 12))
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.1), 2)
    meta = inner.init(dict(module.named_parameters()))
    sets = [om.Batch(torch.randn(n, 1, 12, 12), torch.arange(n) % 2) for n in (2, 64)]

    def peak(rows):
        with MemoryMeter() as meter:
            om.exact(inner, query_chunk=rows)(meta, om.Task(*sets))
        return meter.peak

    assert peak(8) <= 0.25 * peak(None)


class Centred(nn.Module):
    """Subtracts the mean of the batch, which no layer of torch's shows."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 2)

    def forward(self, x):
        return self.map(x - x.mean(0))


def test_models_that_cannot_be_computed_in_chunks_are_refused():
    _, inner, _ = setting("conv_batch_norm")
    for make in (om.exact, om.first_order):
        with pytest.raises(
            ValueError, match=r"the layer 'body\.1' \(BatchNorm2d\) normalises each sample by all others"
        ):
            make(inner, query_chunk=2)
    given, inner, _ = setting("mlp_tanh")
    mixing = om.Inner(om.model_loss(Centred().double(), "mse"), om.rules.sgd(lr=0.1), 1)
    with pytest.raises(ValueError, match="cannot be computed in chunks: changing one sample changes what"):
        om.exact(mixing, query_chunk=2)(mixing.init(dict(Centred().double().named_parameters())), given.task(0))
    with pytest.raises(ValueError, match=r"not one of om\.model_loss"):
        om.exact(om.Inner(lambda params, batch: batch.x.sum(), om.rules.sgd(lr=0.1), 1), query_chunk=2)
    with pytest.raises(ValueError, match="query_chunk is 0: the query set is computed in parts of at least 1 sample"):
        om.exact(inner, query_chunk=0)
