"""Dropout masks are a function of the task and the step alone."""

import threading

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.functional.randomness import seeded
from online_meta.inner import init_carry, query_loss, see_support
from online_meta.regret.scoring import score_task
from tests.numerics.problems import RANDOM, problem, regression_task


class Masks(nn.Module):
    """A linear layer followed by dropout; it records every mask."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.seen = nn.Linear(4, 2), nn.Dropout(0.5), []

    def forward(self, x):
        self.seen.append(self.dropout(torch.ones(len(x), 32)))
        return self.layer(x) * self.seen[-1].mean(1, keepdim=True)


def masks_of(play):
    """Return the masks drawn while ``play`` runs on (inner, meta)."""
    seen = []
    module = Masks().double()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 3)
    keep = torch.nn.modules.module.register_module_forward_hook(
        lambda layer, given, output: seen.append(output) if isinstance(layer, nn.Dropout) else None
    )
    try:
        play(inner, inner.init(dict(module.named_parameters())))
    finally:
        keep.remove()
    return seen


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_each_step_and_each_task_has_its_own_masks():
    first, second = (masks_of(lambda inner, meta, s=s: inner.adapt(meta, regression_task(s).support)) for s in range(2))
    assert len(first) == len(second) == 3
    drawn = [*first, *second, *masks_of(lambda inner, meta: query_loss(inner, meta, {}, regression_task().query))]
    assert len({tuple(mask.flatten().tolist()) for mask in drawn}) == 7
    assert {value for mask in drawn for value in mask.unique().tolist()} == {0.0, 2.0}


def test_the_backward_pass_reuses_the_masks_of_the_forward_pass():
    seen = masks_of(lambda inner, meta: om.exact(inner)(meta, regression_task()))
    forward, query, back = seen[:3], seen[3], seen[4:]
    assert same(back, forward[::-1])
    assert not any(torch.equal(query[:4], mask[:4]) for mask in forward)
    again = masks_of(lambda inner, meta: om.exact(inner, rematerialise=True)(meta, regression_task()))
    assert {tuple(mask.flatten().tolist()) for mask in again} == {tuple(mask.flatten().tolist()) for mask in seen}


def test_masks_do_not_depend_on_earlier_draws():
    def adapt(inner, meta):
        torch.rand(7)
        inner.adapt(meta, regression_task().support)

    torch.manual_seed(1)
    first = masks_of(adapt)
    torch.manual_seed(2)
    assert same(first, masks_of(adapt))


def test_masks_follow_the_documented_seeds():
    """Inner step k draws with number k + 1 on the support set, the query loss with number 0 on the query set."""
    task = regression_task()
    expected = []
    for batch, draw in [*((task.support, k + 1) for k in range(3)), (task.query, 0)]:
        with seeded(batch, draw):
            expected.append(nn.functional.dropout(torch.ones(len(batch.x), 32), 0.5))
    assert same(masks_of(lambda inner, meta: om.exact(inner)(meta, task))[:4], expected)


@pytest.mark.parametrize("name", RANDOM)
def test_torchs_global_generator_is_left_unchanged(name):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 2)
    meta, task = inner.init(given.weights()), make_task()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    carry = init_carry(inner, meta, task.support)
    see_support(inner, meta, carry.phi, task.support, 0)
    for gradient in (om.exact, om.first_order, om.reptile, om.supervised):
        gradient(inner)(meta, task)
    score_task(inner, meta, task)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", RANDOM)
def test_scoring_uses_no_dropout(name):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 2)
    meta, task = inner.init(given.weights()), make_task()
    score = score_task(inner, meta, task)
    without_dropout = om.model_loss(module.eval(), loss)
    adapted = inner.adapt(meta, task.support)
    assert score.loss_before == float(without_dropout(meta.weights, task.query))
    assert score.loss_after == float(without_dropout(adapted, task.query))
    assert score.loss_before != float(inner.loss(meta.weights, task.query))
    assert score == score_task(inner, meta, task)


def test_concurrent_threads_do_not_mix_their_random_numbers():
    """Adaptation requests run in threads, and no thread may draw from another thread's seed."""
    batches = [regression_task(seed).support for seed in (1, 2)]
    entered, found = threading.Event(), []

    def draw_second():
        with seeded(batches[1], 0):
            entered.set()
            found.append(torch.rand(3))

    other = threading.Thread(target=draw_second, daemon=True)
    with seeded(batches[0], 0):
        other.start()
        entered.wait(0.2)  # long enough for a thread that does not wait to draw from this seed
        found.append(torch.rand(3))
    other.join(30)
    alone = []
    for batch in batches:
        with seeded(batch, 0):
            alone.append(torch.rand(3))
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])
