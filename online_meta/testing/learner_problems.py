"""A small stream of float64 regression tasks, and what learners of it are made from."""

from typing import Any

import torch
from torch import nn

import online_meta as om
from online_meta.learners import LearnerContext, MemoryReplayBuffer, TaskShape, can_answer
from online_meta.replay.uniform import uniform

LR = 0.05
STEPS = 2


def net(seed: int = 0) -> nn.Module:
    """Return a network 3 -> 4 -> 2 in float64 whose weights are a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def weights_of(module: nn.Module) -> om.Params:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def task(seed: int, support: int = 4, query: int = 3) -> om.Task:
    """Return a random affine map of x, (n, 3) -> (n, 2)."""
    random = torch.Generator().manual_seed(seed)
    slope, shift = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((3, 2), (2,)))

    def batch(size: int) -> om.Batch:
        x = torch.randn(size, 3, generator=random, dtype=torch.float64)
        return om.Batch(x, x @ slope + shift)

    return om.Task(batch(support), batch(query))


def stream(rounds: int, seed: int = 0) -> list[om.Task]:
    return [task(1000 * seed + t) for t in range(rounds)]


def answers_numbers(learner: str) -> bool:
    """Return whether a learner of the registry answers the tasks of ``stream``; the others answer classes alone."""
    return can_answer(learner, TaskShape("mse", (3,), "float64", (2,)))


def stream_for(learner: str, rounds: int) -> list[om.Task]:
    """Return the tasks of ``stream``, for a learner of classes with the larger one of two targets as the class."""
    if answers_numbers(learner):
        return stream(rounds)
    return [om.Task(*(batch._replace(y=batch.y.argmax(1)) for batch in one)) for one in stream(rounds)]


def setup_for(learner: str, **changes: Any) -> LearnerContext:
    """Return the set-up of ``setup`` for the tasks of ``stream_for``."""
    if answers_numbers(learner):
        return setup(**changes)
    inner = om.Inner(om.model_loss(net(), "cross_entropy"), om.rules.sgd(lr=LR), STEPS)
    return setup(**{"inner": inner, "gradient": om.exact(inner), **changes})


def optimizer(meta: om.Meta) -> om.MetaOptimizer:
    return om.MetaOptimizer(meta, "adam", 0.01)


def setup(**changes: Any) -> LearnerContext:
    """Return a small set-up with a past of its own; ``changes`` replace its fields."""
    module = net()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), STEPS)
    fields: dict[str, Any] = {
        "inner": inner,
        "gradient": om.exact(inner),
        "start": inner.init(weights_of(module)),
        "draw_weights": lambda round: weights_of(net(100 + round)),
        "engine": optimizer,
        "replay": uniform(),
        "batch": 3,
        "steps_per_round": 2,
        "seed": 5,
        "buffer": MemoryReplayBuffer(),
    }
    return LearnerContext(**{**fields, **changes})


def remembered(tasks: list[om.Task]) -> MemoryReplayBuffer:
    buffer = MemoryReplayBuffer()
    for round, one in enumerate(tasks):
        buffer.add(round, one)
    return buffer


def frozen(params: om.Params) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return all bits of some tensors, to be compared with ==."""
    return {name: (str(p.dtype), tuple(p.shape), p.detach().numpy().tobytes()) for name, p in params.items()}


class Unread:
    """A past that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the past was asked for {name}")


def bytes_held(learner: Any, rounds: int = 8) -> list[int]:
    """Return how much a learner saves before each of some rounds, in none of which it may revisit any."""
    held = []
    for one in stream(rounds):
        held.append(sum(value.nbytes for value in learner.save().values()))
        learner.score(one)
        assert learner.learn(one).replayed == ()
    return held
