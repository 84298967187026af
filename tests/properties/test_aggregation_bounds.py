"""Sequences of losses that are drawn and shrunk: none breaks the bound of an aggregation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
