"""Samples of weight 0 are padding: no learner takes notice of them."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import online_meta.learners
from online_meta import registry
from online_meta.prediction import loss_of
from online_meta.testing.learner_problems import setup_for, stream_for
from online_meta.types import Batch, Task

QUICK = {
    "from_scratch": {"steps": 4},
    "moml": {"steps": 3},
    "ridge_head": {"per": "both"},
    "logistic_head": {"per": "both"},
}
"""Options that keep the test short, or with which a learner has a state."""


def make(name):
    return registry.load_module(online_meta.learners, name).build(setup_for(name), **QUICK.get(name, {}))


def padded(batch, random):
    """Return the batch with two samples of weight 0, one in front and one at the end, which say something else."""
    rows = torch.tensor([1, *range(len(batch.x)), 0])
    weight = torch.ones(len(rows), dtype=torch.float64)
    weight[0] = weight[-1] = 0.0
    noise = 3 * torch.randn(len(rows), 3, generator=random, dtype=torch.float64) * (weight == 0)[:, None]
    return Batch(batch.x[rows] + noise, batch.y[rows], weight)


@pytest.mark.parametrize("name", registry.names(online_meta.learners))
def test_samples_of_weight_0_do_not_count(name):
    """Neither when a task is answered, nor when it is scored, nor when it is learned."""
    tasks, random = stream_for(name, 4), torch.Generator().manual_seed(0)
    plain, other = make(name), make(name)
    for task in tasks:
        longer = Task(*(padded(batch, random) for batch in task))
        found, right = other.scores(longer), plain.scores(task)
        assert found.keys() == right.keys()
        for suffix, score in right.items():
            ours, theirs = ([leaf for leaf in tree_leaves(one) if leaf is not None] for one in (found[suffix], score))
            assert ours == pytest.approx(theirs, rel=1e-9), suffix
        learned = plain.learn(task), other.learn(longer)
        assert learned[0].replayed == learned[1].replayed
    for one in (plain, other):
        one.learn_more(0)
    again = stream_for(name, 6)[5]
    answers = [one.answers(one.state(), again.support, again.query.x)[""] for one in (plain, other)]
    right, found = (loss_of(answer, again.query.y) for answer in answers)
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)
