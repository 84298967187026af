"""The comparators that say they have settled are near what long independent searches find on runs of small networks."""

import pytest

from tests.experiments.comparator_minima import Measured, measure, play


@pytest.mark.parametrize("run", ["sinusoid", "recurring"])
def test_no_long_search_is_far_below_a_settled_comparator(run):
    """Within 5 % of its total, or 1 % of what the leader loses on the same tasks."""
    played = play(run, 12, every=4)
    for kind, steps in (("dynamic", 900), ("hindsight", 1500)):
        found = measure(kind, played, steps)
        lost, total = found.leader, found.comparator.cumulative_loss
        assert total <= lost
        if found.comparator.settled:
            assert total - found.independent < max(0.05 * total, 0.01 * lost)


def test_the_ratio_is_that_of_the_comparator_to_the_search():
    comparator = type("Found", (), {"cumulative_loss": 3.0})()
    assert Measured(comparator, 4.0, 2.0, 1.0).ratio() == 1.5
