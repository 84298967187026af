"""Learning efficiency: how many points of a support set are needed to reach a proficiency."""

import pytest

from online_meta.regret.scoring import points_needed
from online_meta.types import PrefixScore, Score

ACCURACIES = Score(2.0, 0.1, 0.95, (PrefixScore(1, 1.5, 0.3), PrefixScore(2, 0.9, 0.9), PrefixScore(5, 0.5, 0.85)))
LOSSES = Score(
    2.0, 0.1, None, (PrefixScore(1, 1.5, None), PrefixScore(2, float("nan"), None), PrefixScore(5, 0.5, None))
)


@pytest.mark.parametrize(
    ("score", "proficiency", "needed"),
    [
        (ACCURACIES, 0.2, 1),
        (ACCURACIES, 0.85, 2),
        (ACCURACIES, 0.9, 2),
        (ACCURACIES, 0.95, 10),
        (ACCURACIES, 0.96, None),
        (LOSSES, 2.0, 1),
        (LOSSES, 1.0, 5),
        (LOSSES, 0.5, 5),
        (LOSSES, 0.1, 10),
        (LOSSES, 0.05, None),
        (Score(1.0, 0.5, None), 0.5, 10),
    ],
)
def test_points_needed_is_the_fewest_points_that_reach_the_proficiency(
    score: Score, proficiency: float, needed: int | None
) -> None:
    assert points_needed(score, 10, proficiency) == needed
