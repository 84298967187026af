"""Sequences of losses that are drawn and shrunk: none breaks the bound of an aggregation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.aggregation._clipping import Clipping, clip_running
from online_meta.testing.experts import ENTRIES, make, play, with_rate

points = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0, allow_subnormal=False))


@st.composite
def sequences(draw):
    """Draw a number of experts, and points of [0, 1] for each round of a game; some rounds repeat."""
    count = draw(st.integers(1, 4))
    row = st.lists(points, min_size=count + 1, max_size=count + 1)
    runs = draw(st.lists(st.tuples(row, st.integers(1, 12)), min_size=1, max_size=8))
    return count, [points for points, repeats in runs for _ in range(repeats)]


@pytest.mark.parametrize("name", ENTRIES)
@settings(max_examples=25, deadline=None)
@given(sequences(), st.sampled_from([1e-6, 1.0, 30.0, 1e12]))
def test_no_drawn_sequence_breaks_the_bound(name, drawn, scale):
    count, sequence = drawn
    assert play(name, make(name), sequence, count, scale) <= 1e-9


@pytest.mark.parametrize("name", ["bayes", "adahedge"])
def test_a_learning_rate_that_is_wrong_is_found(name):
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(sequences())
    def hold(drawn):
        count, sequence = drawn
        assert play(name, with_rate(make(name), 1 / 16), sequence, count, 30.0) <= 1e-9

    with pytest.raises(AssertionError):
        hold()


@settings(max_examples=60, deadline=None)
@given(sequences(), st.floats(0.0, 1.0), st.floats(1.0, 10.0), st.integers(1, 5), st.floats(-5.0, 5.0))
def test_no_drawn_sequence_breaks_the_bound_of_clipped_losses(drawn, quantile, factor, rounds, shift):
    """The loss of the mixture is any number up to the largest loss: clipped, it may be above the weighted mean."""
    count, sequence = drawn
    aggregation = clip_running(make("adahedge"), Clipping(quantile, factor, rounds))
    state = aggregation.init(count)
    for *points, last in sequence:
        losses = torch.tensor([10.0 ** (6 * point) + shift for point in points], dtype=torch.float64)
        mixture = float(losses.min() + last * (losses.max() - losses.min()))
        state = aggregation.update(state, losses, mixture if last else None)
        assert aggregation.regret(state) <= aggregation.bound(state) + 1e-6 * float(losses.abs().max())


def test_one_huge_loss_does_no_harm_if_losses_are_clipped():
    draw = torch.Generator().manual_seed(0)
    after = []
    for aggregation in (make("adahedge"), clip_running(make("adahedge"))):
        state = aggregation.init(2)
        for t in range(100):
            losses = torch.tensor([1.0, 2.0], dtype=torch.float64) + 0.1 * torch.rand(2, generator=draw)
            state = aggregation.update(state, losses if t else losses + torch.tensor([1e6, 0.0]))
        after.append(aggregation.weights(state)[0].item())
    assert after[0] < 0.3
    assert after[1] > 0.99


def test_an_expert_whose_loss_was_clipped_has_no_weight_until_its_loss_is_usual_again():
    aggregation = clip_running(make("tracking"))
    state, seen = aggregation.init(3), []
    for first in (1.0, 1e30, 1e30, 1.0, 1.0):
        state = aggregation.update(state, torch.tensor([first, 1.5, 2.0], dtype=torch.float64))
        seen.append(aggregation.weights(state).tolist())
    assert [weights[0] == 0 for weights in seen] == [False, True, True, False, False]
    assert [math.fsum(weights) for weights in seen] == pytest.approx([1.0] * 5)
    everyone = aggregation.update(state, torch.full((3,), 1e30, dtype=torch.float64))
    assert (aggregation.weights(everyone) > 0).all()
