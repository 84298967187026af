"""What every comparator keeps."""

import math

import pytest
import torch

import trainers.comparators
from online_meta import registry
from online_meta.learners import MemoryReplayBuffer
from online_meta.regret.scoring import score_task
from online_meta.types import Batch, Task
from trainers.build import build_context
from trainers.comparators import PROVIDED, RefreshRequest, is_exact, load_comparator
from trainers.seams import COMPARATORS, list_options
from trainers.settings import InnerSettings, ModelSettings, RegretSettings, TrainerSettings

KINDS = registry.names(trainers.comparators)
QUICK = RegretSettings(hindsight_steps=1.0, hindsight_restarts=1, hindsight_max_passes=1, dynamic_steps=2)
ROUNDS = 6

every_kind = pytest.mark.parametrize("kind", KINDS)


def draw_task(seed):
    """A line through a random slope, (5, 2) -> (5, 1)."""
    random = torch.Generator().manual_seed(seed)
    slope, x = torch.randn(2, 1, generator=random), torch.randn(10, 2, generator=random)
    return Task(Batch(x[:5], x[:5] @ slope), Batch(x[5:], x[5:] @ slope))


@pytest.fixture
def context():
    """A linear model, on which every comparator is defined."""
    model = ModelSettings("torch.nn:Linear", {"in_features": 2, "out_features": 1}, "mse")
    buffer = MemoryReplayBuffer()
    for seed in range(ROUNDS):
        buffer.add(seed, draw_task(seed))
    return build_context(TrainerSettings(model, InnerSettings(steps=1, lr=0.1)), buffer)


def refresh(kind, context, request, saved=None, should_continue=lambda: True):
    options = getattr(load_comparator(kind), "EXAMPLE_OPTIONS", {})
    return registry.load(trainers.comparators, kind)(context, QUICK, request, saved, should_continue, **options)


@every_kind
def test_it_names_its_rounds_and_gives_a_finite_loss_and_state(kind, context):
    found = refresh(kind, context, RefreshRequest(ROUNDS))
    assert found.comparator.as_of_round == ROUNDS
    assert math.isfinite(found.comparator.cumulative_loss)
    assert found.comparator.standard_error >= 0
    assert all(isinstance(value, torch.Tensor) for value in found.saved.values())


@every_kind
def test_it_continues_from_its_own_state(kind, context):
    first = refresh(kind, context, RefreshRequest(ROUNDS - 2))
    then = refresh(kind, context, RefreshRequest(ROUNDS, covered=ROUNDS - 2), first.saved)
    assert then.comparator.as_of_round == ROUNDS
    assert math.isfinite(then.comparator.cumulative_loss)


@every_kind
def test_the_same_request_gives_the_same_answer(kind, context):
    first, second = (refresh(kind, context, RefreshRequest(ROUNDS)) for _ in range(2))
    assert first.comparator == second.comparator


@every_kind
def test_it_stops_when_it_is_asked_to(kind, context):
    assert refresh(kind, context, RefreshRequest(ROUNDS), should_continue=lambda: False) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if is_exact(kind)])
def test_an_exact_one_is_no_worse_than_the_start(kind, context):
    found = refresh(kind, context, RefreshRequest(ROUNDS))
    losses = [score_task(context.inner, context.start, context.buffer[t]).loss_after for t in range(ROUNDS)]
    assert found.comparator.cumulative_loss <= sum(losses)


@every_kind
def test_options_come_after_what_the_program_gives(kind):
    assert not set(list_options(COMPARATORS, kind)) & set(PROVIDED)
