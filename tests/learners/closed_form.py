"""Small runs for learners that answer without parameters of the model."""

from typing import NamedTuple

import torch
from torch import nn

import online_meta as om
from online_meta.batches import concat_support_query
from online_meta.testing.learner_problems import setup, stream, weights_of

CLASSES = 4


def assert_close(found, right, tolerance):
    torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


class Case(NamedTuple):
    """The settings of a run, and its tasks."""

    context: om.learners.LearnerContext
    tasks: list[om.Task]


def of_loss(loss, model=None, **options):
    """Return the context of a run with a loss."""
    model = nn.Linear(3, CLASSES).double() if model is None else model
    inner = om.Inner(om.model_loss(model, loss, loss_options=options or None), om.rules.sgd(lr=0.1), 1)
    return setup(inner=inner, gradient=om.exact(inner), start=inner.init(weights_of(model)))


def of_classes(loss="cross_entropy"):
    """Return a run whose classes are the signs of the first two targets of the regression tasks."""

    def label(batch):
        return batch._replace(y=(batch.y[:, 0] > 0).long() + 2 * (batch.y[:, 1] > 0).long())

    return Case(of_loss(loss), [om.Task(*map(label, task)) for task in stream(4)])


def of_numbers(loss="mse"):
    return Case(of_loss(loss, nn.Linear(3, 2).double()), stream(4))


def learn(learner, tasks):
    for task in tasks:
        learner.score(task)
        assert [step.skipped for step in learner.learn(task).steps] in ([], [None])
    return learner


def output_of(learner, support, x):
    """Return the one output of a learner's answer."""
    ((_, outputs, log_weights),) = learner.answers(learner.state(), support, x)[""]
    assert log_weights.tolist() == [0.0]
    return outputs[0]


def pooled(tasks):
    """Return the samples of all tasks as one batch."""
    batches = [concat_support_query(task) for task in tasks]
    return om.Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
