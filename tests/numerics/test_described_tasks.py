"""Tasks that are functions or environments: x describes them, and the model's output is an objective or a return."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import online_meta as om
from online_meta.answers import answer_by_inner_loop, pack_meta
from online_meta.functional.keyed import normal_like
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.prediction import loss_of
from online_meta.regret.scoring import score_task

SIZE = 3


class Quadratic(nn.Module):
    """The function |W theta - b|^2 of its own weight theta, a row (w, b) of x at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :-1] @ self.theta - x[:, -1]).square()


class Walker(nn.Module):
    """Returns of rollouts towards the goals in x: noisy steps of a position, chosen by a linear policy."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        position, total = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, 0])
        for _ in range(3):
            move = self.policy(torch.cat([position, x[:, :1]], 1))
            position = position + move + 0.1 * normal_like(move.detach())
            total = total - (position - x[:, :1]).square()[:, 0]
        return total


def described(seed: int, columns: int) -> om.Task:
    """Return a task whose support and query set are the same description; y says nothing."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4, columns, generator=random, dtype=torch.float64)
    batch = om.Batch(x, torch.zeros(4, dtype=torch.float64))
    return om.Task(batch, batch)


def test_the_meta_gradient_of_a_function_is_that_of_the_unrolled_optimizer():
    module, task = Quadratic(), described(0, SIZE + 1)
    inner = om.Inner(om.model_loss(module, "objective"), om.rules.meta_sgd(lr=0.05), 3)
    meta = inner.init(dict(module.named_parameters()))
    found = om.exact(inner)(meta, task)
    theta, rate = (value.clone().requires_grad_() for value in (meta.weights["theta"], meta.rule["theta"]))
    phi = theta
    for _ in range(3):
        value = (task.support.x[:, :-1] @ phi - task.support.x[:, -1]).square().mean()
        phi = phi - rate * torch.autograd.grad(value, phi, create_graph=True)[0]
    value = (task.support.x[:, :-1] @ phi - task.support.x[:, -1]).square().mean()
    right = torch.autograd.grad(value, (theta, rate))
    assert float(found.loss) == pytest.approx(float(value.detach()), rel=1e-12)
    assert torch.allclose(found.grads.weights["theta"], right[0], rtol=1e-10)
    assert torch.allclose(found.grads.rule["theta"], right[1], rtol=1e-10)


def test_rates_are_learned_on_functions_that_begin_at_fresh_weights():
    module = Quadratic()
    inner = om.Inner(om.model_loss(module, "objective"), om.rules.meta_sgd(lr=0.01), 5, begin="fresh")
    meta = inner.init(dict(module.named_parameters()))
    learner = FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta, "adam", 0.01), batch=8)
    new = [described(1000 + seed, SIZE + 1) for seed in range(20)]
    before = sum(score_task(inner, meta, task).loss_after for task in new)
    for round in range(40):
        task = described(round, SIZE + 1)
        learner.score(task)
        learner.learn(task)
    after = sum(score_task(inner, learner.engine.meta(), task).loss_after for task in new)
    assert after < 0.7 * before, "learned rates descend further in the same steps"
    assert torch.equal(learner.engine.meta().weights["theta"], meta.weights["theta"]), "no weight is carried over"


def test_returns_are_those_of_keyed_rollouts_in_learning_and_in_answers():
    module, task = Walker(), described(3, 1)
    loss = om.model_loss(module, "return", random="keyed")
    inner = om.Inner(loss, om.rules.sgd(lr=0.01), 2, seed=5)
    meta = inner.init(dict(module.named_parameters()))
    state = pack_meta(meta)
    first, again, other = (
        answer_by_inner_loop(replace(inner, seed=seed), meta, task.support, task.query.x)[""] for seed in (5, 5, 6)
    )
    assert torch.equal(first[0].outputs, again[0].outputs), "the same support set has the same rollouts"
    assert not torch.equal(first[0].outputs, other[0].outputs), "another run has others"
    assert float(loss_of(first, task.query.y)) == pytest.approx(-float(first[0].outputs.mean()), rel=1e-12)
    learner = FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta, "adam", 0.01))
    assert learner.score(task).loss_after == float(loss_of(first, task.query.y)), "it is scored as it answers"
    assert state.keys() == learner.state().keys()

    tasks = [described(seed, 1) for seed in range(3)]
    stacked = om.Task(
        *(om.Batch(*(torch.stack(parts) for parts in zip(*half, strict=True))) for half in zip(*tasks, strict=True))
    )
    each = vmap(om.exact(inner), (None, 0))(meta, stacked)
    for at, one in enumerate(tasks):
        alone = om.exact(inner)(meta, one)
        assert torch.allclose(each.loss[at], alone.loss, rtol=1e-12)
        for name, grad in alone.grads.weights.items():
            assert torch.allclose(each.grads.weights[name][at], grad, rtol=1e-9), name
